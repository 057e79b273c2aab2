"""Load the native half of the channel before pyfuse3.

pyfuse3 keeps its libfuse session to itself. The native module exports ``fuse_session_mount``; loaded
first, and with RTLD_GLOBAL, it is what pyfuse3 calls. It notes the session and calls libfuse's function
(``native/session.cpp``). So this module must be imported before pyfuse3, which ``cleanfs/__init__.py``
sees to.
"""

import os
import sys
from types import ModuleType


def _load() -> ModuleType | None:
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        from cleanfs.fuse import _channel  # type: ignore[attr-defined]  # the native module
    except ImportError:  # it could not be built, or libfuse is not there
        return None
    else:
        return _channel  # type: ignore[no-any-return]  # a module
    finally:
        sys.setdlopenflags(flags)


native = _load()
"""The native module; None if it was not built."""
