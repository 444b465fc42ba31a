"""One script for each paper; each writes its section of the results page to benchmarks/results/papers."""
