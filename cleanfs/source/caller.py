"""The process that makes a request. The source sees only the daemon, so some checks are made here."""

from dataclasses import dataclass

import pyfuse3
from pyfuse3 import RequestContext


@dataclass(frozen=True, slots=True)
class Caller:
    """The requester: the process that a request is from."""

    uid: int
    gid: int
    pid: int
    """0 if it is in a process namespace that ours does not see."""

    @classmethod
    def of(cls, ctx: RequestContext) -> "Caller":
        """Take it from a request."""
        return cls(ctx.uid, ctx.gid, ctx.pid)

    @property
    def privileged(self) -> bool:
        """Tell whether its changes leave set-id bits alone (CAP_FSETID)."""
        return self.uid == 0

    def in_group(self, gid: int) -> bool:
        """Tell whether it is a member of a group. In doubt, as when it is gone, it is not."""
        if gid == self.gid:
            return True
        try:
            return gid in pyfuse3.get_sup_groups(self.pid)
        except (OSError, RuntimeError, ValueError):
            return False
