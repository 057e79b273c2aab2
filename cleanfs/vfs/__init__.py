"""Inodes, open files and their coherency with the source."""
