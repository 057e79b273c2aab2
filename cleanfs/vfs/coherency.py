"""Detect that the source was changed by others.

Pages hang on a file key and on the *fingerprint* under which they were read: size, mtime, ctime.
When the file is opened, or its attributes are refreshed, and the fingerprint is another one, every
page of it is flushed, here and in the kernel.

A fingerprint is *racy* (git's word, ``Documentation/technical/racy-git.txt``) if it was taken while
another change could still have left it as it is: within the timestamp granularity of the file's
last change. A racy fingerprint shows a change but cannot prove that there was none, so an open
that finds it flushes, once, and takes a new one.

Our own changes move the fingerprint too. The worker thread that makes one takes a fingerprint right
before and right after. If the first is the known one, nobody else has changed the file, and the second
takes its place. A change by others between the two is not lost: the new fingerprint is racy, so the
next open flushes.
"""

from dataclasses import replace
from enum import StrEnum

from cleanfs.cache.files import CachedFile
from cleanfs.cache.fingerprint import Fingerprint
from cleanfs.cache.pagecache import PageCache


class Coherency(StrEnum):
    """What may change the source beside this mount."""

    OPEN = "open"
    """Checked at open and at attribute refresh."""
    WATCH = "watch"
    """The same, and the kernel reports changes of the source (fanotify)."""
    NONE = "none"
    """Nothing else changes the source."""


ATTR_TIMEOUTS = {Coherency.OPEN: 1.0, Coherency.WATCH: 1.0, Coherency.NONE: 86_400.0}
"""Default attribute and entry timeouts, in seconds.

Where nobody else changes the source, what the kernel knows is right until it is forgotten for want of
memory. A day, and not forever: a source that was changed all the same is not hidden for good.

Watching could do with long ones, but for what has no event: a write through a mapping moves mtime, and
a refresh finds that.
"""


class CoherencyChecker:
    """Compares each stat of a cached file with what is known, and flushes in doubt.

    A stat comes from a thread and may be old when it arrives. So the page cache's clock is read before
    each (``as_of``); a change of ours, or a newer fingerprint, gives the file a later version. A stat
    that was overtaken and differs makes the file *distrusted*: no fingerprint, size 0. That sends every
    read to the source until there is a stat that nothing overtook.
    """

    def __init__(self, pagecache: PageCache, mode: Coherency) -> None:
        """Check the files of one page cache."""
        self._pagecache = pagecache
        self.mode = mode
        self.changes_found = 0
        """Files flushed because the source had another fingerprint, which was not our doing."""
        self.doubtful_flushes = 0
        """Files flushed because nothing shows whether the source changed: a racy fingerprint, a stat
        that was overtaken, a change of ours that failed half-way, lost events."""

    def on_open(self, file: CachedFile, now: Fingerprint, as_of: int) -> bool:
        """Compare what an open saw. Return whether the kernel must drop its pages too."""
        known = file.fingerprint
        if known is None:
            if not _overtaken(file, as_of):
                self._accept(file, now)
            # Nothing of ours is stale, but the kernel may have pages that are older than our record.
            return self.mode is not Coherency.NONE
        if self.mode is not Coherency.NONE and known == now and known.racy:
            self._flush_in_doubt(file)
            self._accept(file, now)
            return True
        return self.on_refresh(file, now, as_of)

    def on_refresh(self, file: CachedFile, now: Fingerprint, as_of: int) -> bool:
        """Compare what an attribute refresh saw. Return whether the kernel must drop its pages."""
        known = file.fingerprint
        if known is None:
            if not _overtaken(file, as_of):
                # The kernel's pages may be older than this: racy, so that the next open drops them.
                self._accept(file, replace(now, racy=True))
            return self._is_open(file)
        if known == now or self.mode is Coherency.NONE:
            return False
        if _overtaken(file, as_of):
            self.distrust(file)
        else:
            self._flush_changed(file)
            self._accept(file, now)
        return True

    def after_own_change(
        self,
        file: CachedFile,
        before: Fingerprint,
        after: Fingerprint,
        *,
        size: int | None = None,
        moves_mtime: bool = True,
    ) -> bool:
        """Compare fingerprints from before and after a change of ours, made under the file's lock.

        Returns True if others changed the file too, or may have: the kernel must drop its pages.
        ``size`` is the size that our change alone leads to, where that is known. ``moves_mtime`` says
        whether our change could move mtime. Any other difference was made by others, between the stats.
        """
        theirs = self.mode is not Coherency.NONE and (
            file.fingerprint not in (None, before)
            or (size is not None and after.size != size)
            or (not moves_mtime and after.mtime_ns != before.mtime_ns)
        )
        if theirs:
            self._flush_changed(file)
        doubtful = file.fingerprint is None and self._is_open(file)
        self._accept(file, after if after.racy else replace(after, racy=True))
        return theirs or doubtful

    def after_name_change(self, file: CachedFile, before: Fingerprint, after: Fingerprint) -> bool:
        """A link, rename or unlink of ours moved the file's ctime; the lock was not held.

        True if the file is distrusted: the kernel must drop its pages too.
        """
        if file.fingerprint in (None, after):
            return False
        if file.mutations == 0 and file.fingerprint == before and before.same_data(after):
            self._accept(file, replace(after, racy=True))
            return False
        self.distrust(file)
        return True

    def distrust(self, file: CachedFile) -> None:
        """Flush a file of which nothing is known for sure; read from the source until the next stat."""
        self._flush_in_doubt(file)
        file.fingerprint = None
        file.size = 0

    def _is_open(self, file: CachedFile) -> bool:
        """Whether the kernel may use pages that it has, of a file of which nothing was known.

        It was told to drop them when the file was distrusted. What it has read since may be from before
        another change.
        """
        return self.mode is not Coherency.NONE and file.handles > 0

    def _accept(self, file: CachedFile, now: Fingerprint) -> None:
        if file.fingerprint != now:
            self._pagecache.new_version(file)
        file.fingerprint = now
        file.size = now.size

    def _flush_changed(self, file: CachedFile) -> None:
        self.changes_found += 1
        self._pagecache.invalidate(file)

    def _flush_in_doubt(self, file: CachedFile) -> None:
        self.doubtful_flushes += 1
        self._pagecache.invalidate(file)


def _overtaken(file: CachedFile, as_of: int) -> bool:
    return file.version > as_of or file.mutations > 0
