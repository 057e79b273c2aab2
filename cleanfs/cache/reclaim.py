"""The reclaim policy of the page cache: it chooses the pages to evict.

Pure: no I/O, no clock, no page contents, only page ids (any hashable, here ints). The page cache
tells the policy what was inserted, hit and discarded, and takes victims from it. One thread only.

``TwoListReclaim`` follows the kernel's page frame reclaim (``mm/vmscan.c``, ``mm/workingset.c``):

* A new page enters the *inactive* list. Reclaim takes the inactive list's oldest page and evicts
  it, unless it was referenced since, in which case it is *activated*. A page that is read once, in
  a scan, thus passes through the short inactive list and never disturbs the active one.
* The *active* list holds at most ``ACTIVE_SHARE`` of the pages. What overflows, oldest first,
  rotates if it was referenced and is *deactivated* otherwise.
* An evicted page leaves a *shadow*. If it comes back while its shadow is still there (a
  *refault*), its reuse distance is within reach of the cache, and it is activated at once. There
  are as many shadows as there have been resident pages, so that the history is as long as the
  cache is large.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

ACTIVE_SHARE = 0.5
"""Part of the resident pages that the active list may hold. The kernel keeps the lists of file
pages about equal when memory is small (``inactive_list_is_low``)."""


class ReclaimPolicy(Protocol):
    """Orders resident pages by how soon they should go. Every call is linear in its pages."""

    refaults: int
    """Pages that came back while their shadows were there."""
    activations: int
    """Pages that reclaim found referenced on the inactive list."""

    def __len__(self) -> int:
        """Return how many pages are resident."""

    def insert(self, pages: Iterable[int]) -> None:
        """Add pages that were not resident."""

    def touch(self, pages: Iterable[int]) -> None:
        """Note that resident pages were hit."""

    def discard(self, pages: Iterable[int]) -> None:
        """Drop pages whose contents were invalidated, with their history."""

    def victims(self, count: int) -> list[int]:
        """Choose and forget up to ``count`` resident pages, the first to go first."""


class TwoListReclaim:
    """Inactive list, active list and shadows of evicted pages (see the module)."""

    def __init__(self) -> None:
        """Start with no page."""
        self._inactive: OrderedDict[int, None] = OrderedDict()
        self._active: OrderedDict[int, None] = OrderedDict()
        self._referenced: set[int] = set()
        self._shadows: OrderedDict[int, None] = OrderedDict()
        self.refaults = 0
        self.activations = 0

    # Invariant: the inactive list, the active list and the shadows are disjoint, and
    # self._referenced holds resident pages only.

    def __len__(self) -> int:
        """Return how many pages are resident."""
        return len(self._inactive) + len(self._active)

    def insert(self, pages: Iterable[int]) -> None:
        """Make new pages inactive, and refaulting ones active."""
        inactive, shadows = self._inactive, self._shadows
        for page in pages:
            if page in shadows:
                del shadows[page]
                self.refaults += 1
                self._active[page] = None
            else:
                inactive[page] = None

    def touch(self, pages: Iterable[int]) -> None:
        """Remember a reference; the lists change only when reclaim looks at the page."""
        self._referenced.update(pages)

    def discard(self, pages: Iterable[int]) -> None:
        """Forget pages wherever they are."""
        for page in pages:
            self._inactive.pop(page, None)
            self._active.pop(page, None)
            self._shadows.pop(page, None)
            self._referenced.discard(page)

    def victims(self, count: int) -> list[int]:
        """Evict from the inactive list, after the active list is back within its share."""
        resident = len(self)
        count = min(count, resident)
        out: list[int] = []
        inactive, referenced = self._inactive, self._referenced
        self._shrink_active(int((resident - count) * ACTIVE_SHARE))
        while len(out) < count:
            if not inactive:  # every page left is active: at least one must come back
                self._shrink_active(int(len(self) * ACTIVE_SHARE))
            page, _ = inactive.popitem(last=False)
            if page in referenced:
                referenced.remove(page)
                self._active[page] = None
                self.activations += 1
            else:
                out.append(page)
        self._shadows.update(dict.fromkeys(out))
        while len(self._shadows) > resident:
            self._shadows.popitem(last=False)
        return out

    def _shrink_active(self, most: int) -> None:
        """Deactivate the oldest active pages down to ``most``; referenced ones get one more round."""
        active, referenced = self._active, self._referenced
        rounds = len(active)
        while len(active) > most:
            page, _ = active.popitem(last=False)
            if page in referenced and rounds > 0:
                referenced.remove(page)
                active[page] = None
            else:
                self._inactive[page] = None
            rounds -= 1
