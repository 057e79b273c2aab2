"""The FUSE handlers, the control directory and the statistics."""
