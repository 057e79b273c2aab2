"""scripts/bench-compare: cleanfs beside its peers, everything in one run."""
