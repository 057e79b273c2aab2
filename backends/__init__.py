"""Find cleancache backends by name, through the entry-point group ``cleanfs.backends``.

An entry point is a callable ``(options: BackendOptions) -> Backend``. It raises ValueError, with a
message for the user, for options that the backend does not support.
"""

from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoints, entry_points

from cleanfs.backends.ops import Backend
from cleanfs.backends.options import BackendOptions

GROUP = "cleanfs.backends"

BackendFactory = Callable[[BackendOptions], Backend]


class UnknownBackendError(LookupError):
    """Says that no installed package provides a backend of that name."""


def names() -> list[str]:
    """Return the names of all installed backends, sorted."""
    return sorted(_installed().names)


def load(name: str) -> BackendFactory:
    """Return the factory of the backend called ``name``. Raises UnknownBackendError."""
    for entry in _installed().select(name=name):
        factory: BackendFactory = entry.load()
        return factory
    raise UnknownBackendError(f"unknown backend {name!r} (installed: {', '.join(names())})")


@cache
def _installed() -> EntryPoints:
    """Return the entry points of all backends; finding them reads a file of each installed package."""
    return entry_points(group=GROUP)
