"""The same system calls on a plain directory and on a mount: every difference."""
