"""The cleanfs mounts of a machine, for ``cleanfs list``."""

import errno
import os
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from cleanfs.cli.client import read_stats
from cleanfs.cli.tables import plain
from cleanfs.linux.mounts import MountPoint
from cleanfs.mount.config import MountError

STATES = {
    errno.ENOTCONN: "dead",
    errno.ETIMEDOUT: "no answer",
    errno.EACCES: "no access",
    errno.ENOENT: "not ours",
}
"""The state of a mount by the error of asking it. Other errors are a state as the kernel words them."""


@dataclass(frozen=True, slots=True)
class MountState:
    """One mount. What only its daemon knows is None where the daemon did not say it."""

    mountpoint: str
    source: str
    state: str
    """``ok``, one of STATES, ``other version`` (its statistics are not this one's), or an error."""
    backend: str | None = None
    hit_ratio: float | None = None
    pid: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Members by name; null for what is not known."""
        return asdict(self)


def mount_state(point: MountPoint) -> MountState:
    """Ask one mount; takes as long as ``forked_call`` waits, at most."""
    try:
        now = read_stats(point.path)
    except MountError:
        return MountState(point.path, point.source, "other version")
    except OSError as exc:
        number = exc.errno or errno.EIO
        return MountState(point.path, point.source, STATES.get(number) or os.strerror(number))
    return MountState(point.path, now["source"], "ok", now["backend"], now["hit_ratio"], now["pid"])


def as_table(mounts: list[MountState]) -> Table:
    """One line each, if there is the width for it."""
    table = Table(box=None, pad_edge=False, header_style="")
    for heading in ("MOUNT POINT", "SOURCE"):
        table.add_column(heading, overflow="fold")
    for heading in ("STATE", "BACKEND"):
        table.add_column(heading, no_wrap=True)
    for heading in ("HIT RATIO", "PID"):
        table.add_column(heading, justify="right", no_wrap=True)
    for mount in mounts:
        table.add_row(
            plain(mount.mountpoint),
            plain(mount.source),
            mount.state,
            plain(mount.backend or "-"),
            "-" if mount.hit_ratio is None else f"{mount.hit_ratio:.1%}",
            "-" if mount.pid is None else str(mount.pid),
        )
    return table
