"""Scripts that measure the systems of single papers; each writes a section of benchmarks/results/papers."""
