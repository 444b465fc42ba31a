"""What the papers behind statecore claim, measured on models that run here; pages in benchmarks/results/papers."""
