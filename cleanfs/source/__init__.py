"""Reading and changing the source."""
