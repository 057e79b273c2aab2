"""Write back what the kernel holds dirty before a signal ends the mount."""

import contextlib
import logging
import os
from dataclasses import dataclass

import trio

from cleanfs.fs.operations import CleanFS
from cleanfs.fuse.isolated_threads import IsolatedThreads
from cleanfs.fuse.notify import Notifier
from cleanfs.linux import syscalls

log = logging.getLogger(__name__)

MMAP_SECONDS = 5.0
"""How long the kernel may write back dirty mappings, after a signal."""

WRITEBACK_SECONDS = 60.0
"""The same with ``--writeback``, where all recent writes may be dirty."""

STALL_SECONDS = 5.0
"""How long no write may finish before the source counts as hung."""

QUIET_SECONDS = 0.02
"""How long no write may come before none is expected any more."""


@dataclass(frozen=True, slots=True)
class FinalWriteBack:
    """Writes back the dirty pages of one mount: those of mappings and, with ``--writeback``, all."""

    mountpoint: str
    seconds: float
    filesystem: CleanFS
    notifier: Notifier
    isolated: IsolatedThreads

    async def run(self) -> None:
        """Write back. Give up if the source hangs, or if programs never stop writing."""
        self.notifier.hurry()
        with trio.move_on_after(self.seconds) as limit:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_when_stalled, limit)
                with contextlib.suppress(OSError):
                    await self._write_back()
                nursery.cancel_scope.cancel()
        if limit.cancelled_caught:
            log.warning("not all that programs wrote may have reached the source")

    async def _cancel_when_stalled(self, scope: trio.CancelScope) -> None:
        ended = -1
        while ended != self.filesystem.writes_ended:
            ended = self.filesystem.writes_ended
            await trio.sleep(STALL_SECONDS)
        scope.cancel()

    async def _write_back(self) -> None:
        """Let the kernel write back dirty mappings, until no write comes any more.

        ``syncfs`` starts that, but on a FUSE file system it was seen to return before the writes came
        (Linux 6.18). The writes that it queued come before the reply to a later request.
        """
        await self.isolated.run_sync(syscalls.sync_file_system, self.mountpoint)
        begun = -1
        while begun != self.filesystem.writes_begun or begun != self.filesystem.writes_ended:
            begun = self.filesystem.writes_begun
            await self.isolated.run_sync(os.statvfs, self.mountpoint)
            await trio.sleep(QUIET_SECONDS)
        # Pages that are still dirty belong to files open for writing, since a close writes back. To
        # invalidate a file, the kernel first writes its pages back and waits for that.
        for node in self.filesystem.open_for_writing():
            self.notifier.inode(node)
        await self.notifier.drained()
