"""Standing where pyfuse3 waits.

pyfuse3 waits through its module global ``trio``, which its own asyncio mode replaces in the same way
(``pyfuse3.asyncio.enable``). Who stands there gets to run before and after each wait for the device.
"""

from typing import Any

import pyfuse3


class StandIn:
    """In front of whatever stood there before, which does all that this does not."""

    _behind: Any = None

    def step_in(self) -> bool:
        """Stand there. False if this pyfuse3 has no such place: it waits elsewhere."""
        if getattr(pyfuse3, "trio", None) is None:
            return False
        self._behind, pyfuse3.trio = pyfuse3.trio, self  # type: ignore[attr-defined]  # of its C module
        return True

    def step_back(self) -> None:
        """No longer; whoever is still behind stands there again."""
        if self._behind is not None and pyfuse3.trio is self:  # type: ignore[attr-defined]  # see above
            pyfuse3.trio = self._behind  # type: ignore[attr-defined]  # see above

    @property
    def lowlevel(self) -> "StandIn":
        """For ``trio.lowlevel``: its names and trio's do not meet."""
        return self

    def __getattr__(self, name: str) -> object:
        """Everything else."""
        for module in (self._behind, getattr(self._behind, "lowlevel", None)):
            if hasattr(module, name):
                found: object = getattr(module, name)
                return found
        raise AttributeError(name)
