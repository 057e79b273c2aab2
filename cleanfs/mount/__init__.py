"""Manage one mount, from its options to its unmount."""
