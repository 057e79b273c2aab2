"""Detect that others changed the source.

Cached pages belong to a file key and to the *fingerprint* under which they were read: size, mtime,
ctime. When an open or an attribute refresh finds another fingerprint, all pages of the file are
flushed, here and in the kernel.

A fingerprint is *racy* (git's word, ``Documentation/technical/racy-git.txt``) if another change could
still leave it unchanged. That is so within the timestamp granularity of the file's last change. A racy
fingerprint can show a change but not prove that there was none. So an open that finds one flushes the
file, once, and takes a new fingerprint.

Our own changes move the fingerprint too. The worker thread that makes a change takes a fingerprint
right before and right after it. If the first is the known one, nobody else has changed the file, and
the second replaces it. A change by others between the two is not lost: the new fingerprint is racy, so
the next open flushes.
"""

from dataclasses import replace
from enum import StrEnum

from cleanfs.cache.files import CachedFile
from cleanfs.cache.fingerprint import Fingerprint
from cleanfs.cache.pagecache import PageCache


class Coherency(StrEnum):
    """Says what may change the source beside this mount."""

    OPEN = "open"
    """Checked at open and at attribute refresh."""
    WATCH = "watch"
    """The same, and the kernel reports changes of the source (fanotify)."""
    NONE = "none"
    """Nothing else changes the source."""


ATTR_TIMEOUTS = {Coherency.OPEN: 1.0, Coherency.WATCH: 1.0, Coherency.NONE: 86_400.0}
"""Default attribute and entry timeouts, in seconds.

Where nobody else changes the source, the kernel's attributes stay right. They still expire after a
day, so that a source that was changed all the same is not hidden for good.

Watching would allow long timeouts, but some changes have no event. A write through a mapping moves
mtime, which a refresh finds.
"""


class CoherencyChecker:
    """Compares each stat of a cached file with its fingerprint, and flushes when in doubt.

    A stat comes from a thread and may be old when it arrives. So the page cache's clock is read before
    each stat (``as_of``). A change of ours, or a newer fingerprint, gives the file a later version,
    which *overtakes* the stat. If such a stat differs, the file becomes *distrusted*: it has no
    fingerprint and size 0. Then every read goes to the source until a stat is not overtaken.
    """

    def __init__(self, pagecache: PageCache, mode: Coherency) -> None:
        """Check the files of one page cache."""
        self._pagecache = pagecache
        self.mode = mode
        self.changes_found = 0
        """Files flushed because the source had another fingerprint, and not by a change of ours."""
        self.doubtful_flushes = 0
        """Files flushed because nothing shows whether the source changed: a racy fingerprint, a stat
        that was overtaken, a change of ours that failed half-way, lost events."""

    def on_open(self, file: CachedFile, now: Fingerprint, as_of: int) -> bool:
        """Compare what an open saw. Return whether the kernel must drop its pages too."""
        known = file.fingerprint
        if known is None:
            if not _overtaken(file, as_of):
                self._accept(file, now)
            # Nothing cached here is stale, but the kernel may have pages older than the record.
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
        """Compare fingerprints from before and after a link, rename or unlink of ours.

        It moved ctime, and the lock was not held. Returns True if the file is distrusted: the kernel
        must drop its pages too.
        """
        if file.fingerprint in (None, after):
            return False
        if file.mutations == 0 and file.fingerprint == before and before.same_data(after):
            self._accept(file, replace(after, racy=True))
            return False
        self.distrust(file)
        return True

    def distrust(self, file: CachedFile) -> None:
        """Flush a file whose state is not known for sure; read from the source until the next stat."""
        self._flush_in_doubt(file)
        file.fingerprint = None
        file.size = 0

    def _is_open(self, file: CachedFile) -> bool:
        """Tell whether the kernel may use cached pages of a file that had no fingerprint.

        It was told to drop them when the file was distrusted. Pages that it has read since may be from
        before another change.
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
