"""Many processes on one mount, and every read held against what could legally be there.

See docs/trust.md for what it checks, ``rules`` for when a read is legal, ``model`` for how the
processes tell each other what they are about to write and what they have written.
"""
