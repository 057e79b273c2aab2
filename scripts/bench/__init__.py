"""Benchmarks compare cleanfs with its peers, and with itself under other options."""
