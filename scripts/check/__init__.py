"""Check for longer than the tests do: loads at random, faults, limits, comparisons."""
