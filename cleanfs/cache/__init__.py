"""The page cache, cleancache above a backend, and what decides which pages stay."""
