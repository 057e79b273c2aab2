"""Hold what benchmarks and checks share."""
