"""The request that the present task handles.

pyfuse3 runs one task for each request in progress. The channel notes in the task's context which
request that is. Without the channel no request is known.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol

Rollback = Callable[[], None]


class Request(Protocol):
    """One message of the kernel, with the fields of struct fuse_in_header (linux/fuse.h)."""

    unique: int
    opcode: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    """The id of the requesting thread; 0 if it is not in our PID namespace."""
    flags: int
    """``open_flags``, ``read_flags``, ``write_flags`` or ``valid``, if the request has one of them."""
    file_flags: int
    """The open file's flags, as fcntl(2) has them now, if this is a READ or WRITE."""
    rollback: Rollback | None
    """Undoes what the reply gives; called if the kernel refuses the reply, as the requester is gone."""


_request: ContextVar[Request | None] = ContextVar("request", default=None)


def current() -> Request | None:
    """Return the request that this task handles, if it is known."""
    return _request.get()


def set_current(request: Request | None) -> None:
    """Note that this task handles a request from now on."""
    _request.set(request)


def on_refusal(rollback: Rollback | None) -> None:
    """Set what to do if the kernel refuses the reply to the present request.

    A handler calls this last. Its reply is sent before any other code runs.
    """
    request = _request.get()
    if request is not None:
        request.rollback = rollback
