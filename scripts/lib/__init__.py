"""What benchmarks and checks share."""
