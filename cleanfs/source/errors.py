"""Errors of the source that are more than an errno."""

import errno
import os


class StaleError(OSError):
    """The file is not where it was: the kernel must look it up again."""

    def __init__(self) -> None:
        """ESTALE."""
        super().__init__(errno.ESTALE, os.strerror(errno.ESTALE))


class HalfDoneError(OSError):
    """A call failed after it had done something that must not be done again."""

    def __init__(self, cause: OSError) -> None:
        """With the errno of ``cause``."""
        super().__init__(cause.errno, cause.strerror)
