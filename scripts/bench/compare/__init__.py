"""Measure cleanfs beside the page cache, compressing file systems and FUSE peers, all in one run."""
