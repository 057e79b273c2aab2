"""Handle the requests on ranges of open files for which pyfuse3 has no handlers.

They are FALLOCATE, LSEEK, COPY_FILE_RANGE and COPY_FILE_RANGE_64. ``vfs.ranges`` does the work.
"""

import errno
import functools
from collections.abc import Mapping

from pyfuse3 import FUSEError

from cleanfs.fs.handle_table import HandleTable
from cleanfs.fs.handler import handler
from cleanfs.fuse.channel import AsyncHandler
from cleanfs.fuse.protocol import (
    FUSE_COPY_FILE_RANGE,
    FUSE_COPY_FILE_RANGE_64,
    FUSE_COPY_FILE_RANGE_IN,
    FUSE_COPY_FILE_RANGE_OUT,
    FUSE_FALLOCATE,
    FUSE_FALLOCATE_IN,
    FUSE_LSEEK,
    FUSE_LSEEK_IN,
    FUSE_LSEEK_OUT,
    FUSE_WRITE_OUT,
)
from cleanfs.fuse.request import Request, context_of, on_refusal
from cleanfs.source.caller import Caller
from cleanfs.vfs.handles import FileHandle
from cleanfs.vfs.ranges import Ranges
from cleanfs.vfs.tree import Tree


class RangeOperations:
    """Handles the requests of one mount."""

    def __init__(self, tree: Tree, handles: HandleTable) -> None:
        """Serve the open files in ``handles``."""
        self._handles = handles
        self._ranges = Ranges(tree)

    def handlers(self) -> Mapping[int, AsyncHandler]:
        """Return the handlers, by opcode."""
        return {
            FUSE_FALLOCATE: self.fallocate,
            FUSE_LSEEK: self.lseek,
            FUSE_COPY_FILE_RANGE: self.copy_file_range,
            FUSE_COPY_FILE_RANGE_64: self.copy_file_range_64,
        }

    @handler
    async def fallocate(self, request: Request, body: bytes) -> bytes:
        """Reserve space, punch a hole or write zeros."""
        fh, offset, length, mode, _ = FUSE_FALLOCATE_IN.unpack_from(body)
        handle = self._file(fh, errno.EOPNOTSUPP)
        caller = Caller.of(context_of(request))
        on_refusal(await self._ranges.allocate(handle, mode, offset, length, caller))
        return b""

    @handler
    async def lseek(self, _: Request, body: bytes) -> bytes:
        """Find data or a hole (SEEK_DATA, SEEK_HOLE)."""
        fh, offset, whence, _ = FUSE_LSEEK_IN.unpack_from(body)
        handle = self._file(fh, errno.EINVAL)
        return FUSE_LSEEK_OUT.pack(await self._ranges.seek(handle, offset, whence))

    @handler
    async def copy_file_range(self, request: Request, body: bytes) -> bytes:
        """Copy less than 4 GiB: the kernel asks for no more where the reply has only 32 bits."""
        return FUSE_WRITE_OUT.pack(await self._copy(request, body), 0)

    @handler
    async def copy_file_range_64(self, request: Request, body: bytes) -> bytes:
        """Copy (Linux 6.18)."""
        return FUSE_COPY_FILE_RANGE_OUT.pack(await self._copy(request, body))

    async def _copy(self, request: Request, body: bytes) -> int:
        unpacked = FUSE_COPY_FILE_RANGE_IN.unpack_from(body)
        source_fh, source_offset, _, target_fh, offset, count, flags = unpacked
        if flags:
            raise FUSEError(errno.EINVAL)
        # Upon EXDEV the kernel copies by reads and writes.
        source, target = (self._file(fh, errno.EXDEV) for fh in (source_fh, target_fh))
        copied, undo = await self._ranges.copy(
            source,
            source_offset,
            target,
            offset,
            count,
            Caller.of(context_of(request)),
            ends=functools.partial(getattr, request, "interrupted"),
        )
        on_refusal(undo)
        return copied

    def _file(self, fh: int, error: int) -> FileHandle:
        """Return an open file. Raises FUSEError with ``error`` for a control file."""
        handle = self._handles[fh]
        if not isinstance(handle, FileHandle):
            raise FUSEError(error)
        return handle
