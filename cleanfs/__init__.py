"""cleanfs: a passthrough FUSE file system with a cleancache layer.

Clean pages that fall out of the page cache are kept, compressed, in RAM, and come back without
touching the source.
"""

from cleanfs.fuse import session as _session  # noqa: F401  # it must be loaded before pyfuse3

__version__ = "0.1.0"
