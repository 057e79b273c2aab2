"""Checks that run for longer than the tests: loads at random, faults, limits, comparisons."""
