"""Fingerprints: a file's size and times when its cached pages were known to be good.

A fingerprint is *racy* (git's word, ``Documentation/technical/racy-git.txt``) if a later change could
leave it as it is: it was taken within the timestamp granularity of the file's last change.
"""

import os
from dataclasses import dataclass, field

from cleanfs.linux.mounts import LOCAL_FILE_SYSTEMS

FINE_NS = 100_000_000
"""Granularity of local file systems. Their clock ticks at least every 10 ms, but a call that writes
takes its timestamp first: on a busy machine it was seen to change the data 30 ms later."""


COARSE_NS = 2_100_000_000
"""Granularity of all others: FAT stamps every 2 s, sshfs every second, a server has its own clock."""


SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What identifies the contents of a file: size and times, as stat reported them."""

    size: int
    mtime_ns: int
    ctime_ns: int
    racy: bool = field(compare=False)

    def same_data(self, other: "Fingerprint") -> bool:
        """Tell whether at most the inode has changed in between: a name, the mode, the owner."""
        return (self.size, self.mtime_ns) == (other.size, other.mtime_ns)


def granularity_ns(st: os.stat_result, fs_type: str) -> int:
    """Return how far apart two changes must be for their timestamps to differ.

    ext3, and old XFS and ext4 inodes, store whole seconds although their type has a fine clock.
    """
    whole_seconds = st.st_mtime_ns % SECOND_NS == 0 and st.st_ctime_ns % SECOND_NS == 0
    return FINE_NS if fs_type in LOCAL_FILE_SYSTEMS and not whole_seconds else COARSE_NS


def fingerprint(st: os.stat_result, fs_type: str, now_ns: int) -> Fingerprint:
    """Make the fingerprint of a file from a stat that began at ``now_ns`` or later (``time.time_ns``).

    The time must be from before the stat: taken after a slow one, it would make a young fingerprint
    look old.
    """
    # A later change can get the same timestamp, if that is from the future (another machine's clock).
    racy = now_ns - max(st.st_mtime_ns, st.st_ctime_ns) < granularity_ns(st, fs_type)
    return Fingerprint(st.st_size, st.st_mtime_ns, st.st_ctime_ns, racy)


def own_fingerprint(st: os.stat_result) -> Fingerprint:
    """Make the fingerprint around a change by cleanfs: racy, as it may hide a change by others."""
    return Fingerprint(st.st_size, st.st_mtime_ns, st.st_ctime_ns, racy=True)
