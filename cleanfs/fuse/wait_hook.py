"""Run code in pyfuse3's wait for requests.

pyfuse3 waits through its module global ``trio``, which its own asyncio mode replaces in the same way
(``pyfuse3.asyncio.enable``). A replacement runs before and after each wait for the device.
"""

from typing import Any

import pyfuse3


class WaitHook:
    """Replaces pyfuse3's ``trio``, and passes on what it does not define to the previous one."""

    behind: Any = None

    def hook(self) -> bool:
        """Install the hook. False if this pyfuse3 waits elsewhere."""
        if getattr(pyfuse3, "trio", None) is None:
            return False
        self.behind, pyfuse3.trio = pyfuse3.trio, self  # type: ignore[attr-defined]  # of its C module
        return True

    def unhook(self) -> None:
        """Remove the hook from its place in the chain of hooks."""
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
        """Stand for ``trio.lowlevel``, whose names do not collide with trio's."""
        return self

    def __getattr__(self, name: str) -> object:
        """Pass on all other names."""
        for module in (self.behind, getattr(self.behind, "lowlevel", None)):
            if hasattr(module, name):
                found: object = getattr(module, name)
                return found
        raise AttributeError(name)
