"""Fingerprints: what stat said of a file when its pages were known to be good.

A fingerprint is *racy* (git's word, ``Documentation/technical/racy-git.txt``) if it was taken while
another change could still have left it as it is: within the timestamp granularity of the file's last
change.
"""

import os
from dataclasses import dataclass, field

from cleanfs.linux.mounts import LOCAL_FILE_SYSTEMS

FINE_NS = 100_000_000
"""Granularity of local file systems. Their clock ticks every 10 ms at most, but a call that writes
takes its stamp first: on a machine with much to do it was seen to change the data 30 ms later."""


COARSE_NS = 2_100_000_000
"""Granularity of all others: FAT stamps every 2 s, sshfs every second, a server has its own clock."""


SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What stat said when the pages were known to be good."""

    size: int
    mtime_ns: int
    ctime_ns: int
    racy: bool = field(compare=False)

    def same_data(self, other: "Fingerprint") -> bool:
        """Whether nothing but the inode can have changed in between: a name, the mode, the owner."""
        return (self.size, self.mtime_ns) == (other.size, other.mtime_ns)


def granularity_ns(st: os.stat_result, fs_type: str) -> int:
    """How far apart two changes must be to be told apart by their stamps.

    ext3 and old XFS and ext4 inodes store whole seconds although their type is a fine one.
    """
    whole_seconds = st.st_mtime_ns % SECOND_NS == 0 and st.st_ctime_ns % SECOND_NS == 0
    return FINE_NS if fs_type in LOCAL_FILE_SYSTEMS and not whole_seconds else COARSE_NS


def fingerprint(st: os.stat_result, fs_type: str, now_ns: int) -> Fingerprint:
    """The fingerprint of a file that was stat'ed at ``now_ns`` or later (``time.time_ns``).

    The time must be from before the stat: taken after, it would make an old fingerprint of a young
    one whenever the answer was slow to arrive.
    """
    # A stamp from the future (another machine's clock) can be met again by a later change.
    racy = now_ns - max(st.st_mtime_ns, st.st_ctime_ns) < granularity_ns(st, fs_type)
    return Fingerprint(st.st_size, st.st_mtime_ns, st.st_ctime_ns, racy)


def own_fingerprint(st: os.stat_result) -> Fingerprint:
    """The fingerprint around a change of ours: racy, as somebody else's may hide behind it."""
    return Fingerprint(st.st_size, st.st_mtime_ns, st.st_ctime_ns, racy=True)
