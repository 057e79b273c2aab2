"""How much memory the caches may use."""
