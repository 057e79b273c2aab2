"""The kernel's side of FUSE: notifications, requests, replies."""
