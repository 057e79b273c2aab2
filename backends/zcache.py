"""zcache: ephemeral pages, compressed, in RAM, under one limit. Which of its two engines is in use.

The native engine (``backends/native``) where it was built, else the Python one
(``backends/reference.py``), which keeps the same contract with fewer choices.
"""

from types import ModuleType

from cleanfs import engines
from cleanfs.backends import codec
from cleanfs.backends.options import BackendOptions
from cleanfs.backends.reference import ReferenceZcache
from cleanfs.ops import Backend


def native_module() -> ModuleType | None:
    """The native engine's module, if it is to be used (``engines.native_module``)."""
    return engines.native_module("cleanfs.backends._zcache")


def engine_name() -> str:
    """``native`` or ``python``."""
    return "python" if native_module() is None else "native"


def make(options: BackendOptions) -> Backend:
    """The backend. Raises ValueError, with a message for the user, for what it can not do."""
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
