"""Benchmarks: cleanfs beside its peers, and beside itself with other options."""
