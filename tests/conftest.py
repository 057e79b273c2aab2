"""Settings of all tests."""

from hypothesis import settings

# No example database: a test run leaves nothing behind, whoever it runs as.
settings.register_profile("cleanfs", database=None)
settings.load_profile("cleanfs")
