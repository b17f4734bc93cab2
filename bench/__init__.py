"""Benchmarks: `python -m pytest bench -q`, `python -m bench.report`, `python -m bench.gpu_check --out DIR`."""
