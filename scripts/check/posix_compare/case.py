"""Define what a case is, and who runs it."""

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

TEAM: Final = 23456
"""The group of the files that setups make."""


@dataclass(frozen=True, slots=True)
class User:
    """Is somebody who runs cases."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


USERS: Final = {
    user.name: user
    for user in (
        User("root", 0, 0),
        User("owner", 12345, TEAM),
        User("member", 12346, 23457, (TEAM,)),
        User("other", 12347, 23458),
    )
}
"""``owner`` owns what setups make unless they say otherwise, ``member`` has its group as well."""

OWNER: Final = USERS["owner"].uid

EVERYBODY: Final = tuple(USERS)
ROOT: Final = ("root",)
MEMBER: Final = ("member",)
ROOT_AND_MEMBER: Final = ("root", "member")


@dataclass(frozen=True, slots=True)
class Case:
    """Is one comparison.

    ``setup`` runs as root, ``action`` as a user, both in a fresh directory, which has a fresh directory
    to itself. What the action returns or raises is the result; what the directories hold afterwards is
    compared as well.
    """

    name: str
    setup: Callable[[], None]
    action: Callable[[], object]
    users: tuple[str, ...] = EVERYBODY


Cases = Iterator[Case]


def attempt(call: Callable[..., object], *args: object, **kwargs: object) -> object:
    """Return what a call returns, or the name of its errno."""
    try:
        return call(*args, **kwargs)
    except OSError as exc:
        return errno.errorcode.get(exc.errno or 0, str(exc.errno))
