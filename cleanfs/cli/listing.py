"""List the cleanfs mounts of a machine, for ``cleanfs list``."""

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
    errno.ETIMEDOUT: "no reply",
    errno.EACCES: "no access",
    errno.ENOENT: "not ours",
}
"""The state of a mount whose statistics fail with an errno. For other errors it is strerror's text."""


@dataclass(frozen=True, slots=True)
class MountState:
    """Describes one mount. Members that only its daemon knows are None if it did not reply."""

    mountpoint: str
    source: str
    state: str
    """``ok``, one of STATES, ``other version`` (of the statistics), or an error."""
    backend: str | None = None
    hit_ratio: float | None = None
    pid: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the members by name; unknown ones are null."""
        return asdict(self)


def mount_state(point: MountPoint) -> MountState:
    """Read the state of one mount, within the time limit of ``forked_call``."""
    try:
        now = read_stats(point.path)
    except MountError:
        return MountState(point.path, point.source, "other version")
    except OSError as exc:
        number = exc.errno or errno.EIO
        return MountState(point.path, point.source, STATES.get(number) or os.strerror(number))
    return MountState(point.path, now["source"], "ok", now["backend"], now["hit_ratio"], now["pid"])


def as_table(mounts: list[MountState]) -> Table:
    """Make a table with one line for each mount, if the width suffices."""
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
