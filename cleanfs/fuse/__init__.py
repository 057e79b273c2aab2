"""Speak FUSE with the kernel: requests, replies, notifications."""
