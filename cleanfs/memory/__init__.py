"""Measure the memory that is left, and limit the caches accordingly."""
