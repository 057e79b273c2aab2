"""Wrap system calls and kernel interfaces, one module each."""
