"""cleanfs: a passthrough FUSE file system with a cleancache layer.

Clean pages that fall out of the page cache are kept, compressed, in RAM, and come back without
touching the source.
"""

__version__ = "0.1.0"
