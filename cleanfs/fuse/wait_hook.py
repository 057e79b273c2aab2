"""Standing where pyfuse3 waits.

pyfuse3 waits through its module global ``trio``, which its own asyncio mode replaces in the same way
(``pyfuse3.asyncio.enable``). Who stands there gets to run before and after each wait for the device.
"""

from typing import Any

import pyfuse3


class WaitHook:
    """In front of whatever stood there before, which does all that this does not."""

    behind: Any = None

    def hook(self) -> bool:
        """Stand there. False if this pyfuse3 has no such place: it waits elsewhere."""
        if getattr(pyfuse3, "trio", None) is None:
            return False
        self.behind, pyfuse3.trio = pyfuse3.trio, self  # type: ignore[attr-defined]  # of its C module
        return True

    def unhook(self) -> None:
        """No longer, wherever in the row: who is behind moves up."""
        if getattr(pyfuse3, "trio", None) is self:
            pyfuse3.trio = self.behind  # type: ignore[attr-defined]  # see above
            return
        before = getattr(pyfuse3, "trio", None)
        while isinstance(before, WaitHook):
            if before.behind is self:
                before.behind = self.behind
            before = before.behind

    @property
    def lowlevel(self) -> "WaitHook":
        """For ``trio.lowlevel``: its names and trio's do not meet."""
        return self

    def __getattr__(self, name: str) -> object:
        """Everything else."""
        for module in (self.behind, getattr(self.behind, "lowlevel", None)):
            if hasattr(module, name):
                found: object = getattr(module, name)
                return found
        raise AttributeError(name)
