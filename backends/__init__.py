"""Cleancache backends, found by name through the entry-point group ``cleanfs.backends``.

An entry point is a callable ``(options: BackendOptions) -> Backend`` that raises ValueError, with a
message for the user, for options that it can not follow.
"""

from collections.abc import Callable
from importlib.metadata import entry_points

from cleanfs.backends.options import BackendOptions
from cleanfs.ops import Backend

GROUP = "cleanfs.backends"

BackendFactory = Callable[[BackendOptions], Backend]


class UnknownBackendError(LookupError):
    """No installed package offers a backend of that name."""


def names() -> list[str]:
    """The names of all installed backends, sorted."""
    return sorted(entry_points(group=GROUP).names)


def load(name: str) -> BackendFactory:
    """The factory of the backend called ``name``. Raises UnknownBackendError."""
    for entry in entry_points(group=GROUP, name=name):
        factory: BackendFactory = entry.load()
        return factory
    raise UnknownBackendError(f"unknown backend {name!r} (installed: {', '.join(names())})")
