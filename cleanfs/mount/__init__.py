"""One mount's life, from its options to its end."""
