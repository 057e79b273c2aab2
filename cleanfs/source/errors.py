"""Errors of the source that are more than an errno."""

import errno
import os


class StaleError(OSError):
    """Says that the file is not where it was: the kernel must look it up again."""

    def __init__(self) -> None:
        """Set errno ESTALE."""
        super().__init__(errno.ESTALE, os.strerror(errno.ESTALE))


class HalfDoneError(OSError):
    """Says that a call failed after it had done something that must not be repeated."""

    def __init__(self, cause: OSError) -> None:
        """Take the errno of ``cause``."""
        super().__init__(cause.errno, cause.strerror)
