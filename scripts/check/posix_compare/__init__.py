"""Make the same system calls on a plain directory and on a mount, and print every difference."""
