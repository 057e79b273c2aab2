"""System calls and kernel interfaces, one module each."""
