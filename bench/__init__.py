"""Throughput benchmarks: the published way against ours, in turn, in one process on one device."""
