"""Benchmarks: what is timed (cases), against whom (peers), and how (timing). Run with `python -m bench`."""
