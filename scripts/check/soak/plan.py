"""Hold what a soak was asked to be."""

from dataclasses import dataclass
from pathlib import Path

PLAIN, MAPPED, SHOWN = range(3)
"""What may be done to a file. To MAPPED ones programs store through mappings, so nobody writes them
with O_DIRECT, cuts them, or changes them in the source: what a page has dirty is written back
whole, and no file system keeps a mapping and O_DIRECT apart. SHOWN ones are mapped for reading
alone: not cut either, as a process that reads a mapping beyond the end dies. All else happens to
PLAIN ones."""

KINDS = (PLAIN, PLAIN, MAPPED, SHOWN)

NAMES = 14

SLACK = 3.0
"""Seconds that a promise in terms of time may be late: a process that waits may run that late."""

WATCH_DELAY = 1.0
"""Seconds in which ``--coherency watch`` promises to notice."""


QUIET = 2
"""Files that the mount does not open again (``quiet``)."""


@dataclass(frozen=True)
class Plan:
    """Holds all that the processes need to know."""

    seed: int
    seconds: float
    source: Path
    mount: Path
    """The same as the source for ``--plain``."""
    evidence: Path
    coherency: str
    processes: int
    cells: int
    """The most that a file has."""
    page_size: int
    attr_timeout: float
    least_pool: int
    page_caches: tuple[int, ...]
    """Limits that the page cache is given in turn."""
    writeback: bool = False
    opens_handles: bool = True
    """Whether the daemon may open files by handle. Otherwise the kernel may miss a new size for a while
    (``Process.may_have_missed_a_size``)."""
    kernel_evicts: bool = False
    """Whether the kernel's evictions are put, and it is made to evict all the time."""
    group: Path | None = None
    """The control group whose page cache it is made to reclaim."""
    holes: bool = False
    """Whether ``fallocate`` works there."""

    @property
    def plain(self) -> bool:
        """Tell whether there is no mount."""
        return self.source == self.mount

    @property
    def source_changes(self) -> bool:
        """Tell whether somebody changes the source behind the mount's back."""
        return self.coherency != "none"

    @property
    def quiet_files(self) -> int:
        """Return how many files are not opened again: they take a mount that watches the source."""
        return QUIET if self.coherency == "watch" else 0
