"""Make a zcache: ephemeral pages, compressed, in RAM, under one limit.

The engine is the native one (``backends/native``) where it was built, else the Python one
(``backends/reference.py``), which keeps the same contract with fewer options.
"""

from types import ModuleType

from cleanfs.backends import codec, engines
from cleanfs.backends.ops import Backend
from cleanfs.backends.options import BackendOptions
from cleanfs.backends.reference import ReferenceZcache


def native_module() -> ModuleType | None:
    """Return the native engine's module if it should be used (see ``engines.native_module``)."""
    return engines.native_module("cleanfs.backends._zcache")


def engine_name() -> str:
    """Return the engine in use: ``native`` or ``python``."""
    return "python" if native_module() is None else "native"


def make(options: BackendOptions) -> Backend:
    """Make the backend. Raises ValueError, with a message for the user, for unsupported options."""
    native = native_module()
    if native is None:
        return ReferenceZcache(options)
    compression = codec.parse(options.compression)
    raw_fits = options.allocator == "log"
    poor = options.poor or ("keep" if raw_fits else "refuse")
    backend: Backend = native.Engine(
        options.pool_limit,
        method=compression.method,
        level=compression.level,
        dictionary=compression.dictionary,
        allocator=options.allocator,
        keep_poor=poor == "keep",
        was_active=options.admission == "was-active",
        checksum=options.checksum,
    )
    return backend
