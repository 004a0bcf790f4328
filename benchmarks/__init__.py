"""Microbenchmarks: ratios against peers, side by side in one run. Run with `python -m benchmarks`."""
