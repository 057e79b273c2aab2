"""The boundary between handlers and pyfuse3: handlers raise nothing but FUSEError."""

import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from pyfuse3 import FUSEError

from cleanfs.fuse.refused_replies import RefusedReplies

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class HasReplies(Protocol):
    """Has handlers, and the undo actions of their replies."""

    refused_replies: RefusedReplies


S = TypeVar("S", bound=HasReplies)


def handler(
    call: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Turn an OSError into its errno. Log any other exception as a bug, and reply EIO.

    An error reply gives nothing, so there is nothing to undo if the kernel refuses it.
    """

    @functools.wraps(call)
    async def wrapped(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await call(self, *args, **kwargs)
        except FUSEError:
            self.refused_replies.hold(None)
            raise
        except OSError as exc:
            self.refused_replies.hold(None)
            raise FUSEError(exc.errno or errno.EIO) from exc
        except Exception as exc:
            self.refused_replies.hold(None)
            log.exception("%s failed", call.__name__)
            raise FUSEError(errno.EIO) from exc

    return wrapped
