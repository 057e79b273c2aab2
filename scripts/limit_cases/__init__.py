"""Cases of scripts/limits: one promise about sizes or numbers to a file."""
