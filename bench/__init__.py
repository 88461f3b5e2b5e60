"""The benchmark: `python -m bench` measures safepoint and others on the same work. Method: docs/benchmarks.md."""
