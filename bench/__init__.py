"""Measurements that the README and README_BENCH.md report; runs from a clone."""
