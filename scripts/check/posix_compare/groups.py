"""Collect all cases."""

from collections.abc import Callable
from fnmatch import fnmatchcase

from . import (
    attributes,
    borders,
    data,
    endpoints,
    gone,
    links,
    listings,
    locks,
    mappings,
    opens,
    paths,
    permissions,
    programs,
    renames,
    setid,
    space,
    xattrs,
)
from .case import Case, Cases

GROUPS: dict[str, Callable[[], Cases]] = {
    "attributes": attributes.cases,
    "borders": borders.cases,
    "data": data.cases,
    "endpoints": endpoints.cases,
    "gone": gone.cases,
    "links": links.cases,
    "listings": listings.cases,
    "locks": locks.cases,
    "mappings": mappings.cases,
    "opens": opens.cases,
    "paths": paths.cases,
    "permissions": permissions.cases,
    "programs": programs.cases,
    "renames": renames.cases,
    "setid": setid.cases,
    "space": space.cases,
    "xattrs": xattrs.cases,
}


def select(
    filters: tuple[str, ...] = (), users: tuple[str, ...] = (), every: int = 1
) -> list[tuple[Case, str]]:
    """Return the cases whose names match a pattern (or begin with one), each with one of its users.

    ``every`` is n for each nth of them.
    """
    chosen = []
    for group in GROUPS.values():
        for case in group():
            if filters and not any(is_meant(case.name, pattern) for pattern in filters):
                continue
            chosen += [(case, user) for user in case.users if not users or user in users]
    return chosen[::every]


def is_meant(name: str, pattern: str) -> bool:
    """Tell whether a name matches a pattern, or begins with it."""
    return name.startswith(pattern) or fnmatchcase(name, pattern)
