"""The boundary between handlers and pyfuse3: handlers raise nothing but FUSEError."""

import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from pyfuse3 import FUSEError

from cleanfs.fuse.request import on_refusal

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


def handler(call: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Turn an OSError into its errno. Log any other exception as a bug, and reply EIO.

    An error reply gives nothing, so there is nothing to undo if the kernel refuses it.
    """

    @functools.wraps(call)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await call(*args, **kwargs)
        except FUSEError:
            on_refusal(None)
            raise
        except OSError as exc:
            on_refusal(None)
            raise FUSEError(exc.errno or errno.EIO) from exc
        except Exception as exc:
            on_refusal(None)
            log.exception("%s failed", call.__name__)
            raise FUSEError(errno.EIO) from exc

    return wrapped
