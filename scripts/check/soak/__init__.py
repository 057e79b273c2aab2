"""Let many processes change and read files on a mount; every read must be legal.

See docs/trust.md for what it checks, ``rules`` for when a read is legal, ``model`` for how the
processes tell each other what they are about to write and what they have written.
"""
