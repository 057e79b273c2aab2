"""The request that the present task handles.

pyfuse3 runs one task for each request in progress. The channel notes in the task's context which
request that is. Without the channel no request is known.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, cast

from pyfuse3 import RequestContext

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
    """The open file's flags, as fcntl(2) has them now, if this is a READ, WRITE or OPENDIR."""
    rollback: Rollback | None
    """Undoes what the reply gives; called if the kernel refuses the reply, as the requester is gone."""
    interrupted: bool
    """Whether a signal has come for the requester."""
    on_interrupt: Callable[[], None] | None
    """Called when one comes."""


@dataclass(frozen=True, slots=True)
class _Context:
    uid: int
    gid: int
    pid: int
    umask: int


def context_of(request: Request, umask: int = 0) -> RequestContext:
    """Return the requester, as pyfuse3 hands it to handlers. Only pyfuse3 can make its own class."""
    return cast(RequestContext, _Context(request.uid, request.gid, request.pid, umask))


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
