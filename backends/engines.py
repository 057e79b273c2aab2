"""Choose the engine: native code where it was built, or Python, its reference.

``CLEANFS_PUREPYTHON=1`` picks Python; ``CLEANFS_REQUIRE_NATIVE=1`` makes it an error that native code
is not there. Both read as scikit-build does: 0, no, off and false are as good as nothing.
"""

import importlib
import os
from types import ModuleType


def native_module(name: str) -> ModuleType | None:
    """Return an extension module, if it should be used.

    Raises ValueError, with a message for the user, if it is required and not there.
    """
    if _is_set("CLEANFS_PUREPYTHON"):
        return None
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        if _is_set("CLEANFS_REQUIRE_NATIVE"):
            raise ValueError(
                f"CLEANFS_REQUIRE_NATIVE is set, but there is no native engine: {exc}"
            ) from exc
        return None


def _is_set(name: str) -> bool:
    value = os.environ.get(name, "").lower()
    return bool(int(value)) if value.isdigit() else value not in ("", "n", "no", "off", "f", "false")
