"""A ring of evicted pages in memory, in the form of the kernel's (BPF_MAP_TYPE_RINGBUF)."""

import mmap
import os
import struct
from typing import Final

PAGE: Final = 4096
RING_BYTES: Final = 1 << 20

HEADER: Final = struct.Struct("=II")
RECORD: Final = struct.Struct(f"=QQQQII{PAGE}s")
STEP: Final = (HEADER.size + RECORD.size + 7) // 8 * 8
POSITION: Final = struct.Struct("=Q")

BUSY: Final = 1 << 31
DISCARDED: Final = 1 << 30


class Ring:
    """The producer's side: the consumer's page, then the producer's, then the data, twice."""

    def __init__(self) -> None:
        """Make an empty ring."""
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * mmap.PAGESIZE + 2 * RING_BYTES)
        self._memory = mmap.mmap(self.fd, 0)
        self._produced = 0

    def close(self) -> None:
        """Close it."""
        self._memory.close()
        os.close(self.fd)

    @property
    def consumed(self) -> int:
        """Return the consumer's position."""
        position: int = POSITION.unpack_from(self._memory, 0)[0]
        return position

    def evict(
        self,
        inode: int,
        index: int,
        page: bytes,
        *,
        file_size: int = 1 << 40,
        readable: bool = True,
        flags: int = 0,
    ) -> int:
        """Add a record. ``flags`` are BUSY or DISCARDED. Returns its place."""
        place = self._produced % RING_BYTES
        assert place + STEP <= RING_BYTES, "this ring does not wrap"
        at = 2 * mmap.PAGESIZE + place
        fields = inode, index, file_size, 0, 0, readable, page
        RECORD.pack_into(self._memory, at + HEADER.size, *fields)
        HEADER.pack_into(self._memory, at, RECORD.size | flags, 0)
        self._produced += STEP
        POSITION.pack_into(self._memory, mmap.PAGESIZE, self._produced)
        return at

    def complete(self, place: int) -> None:
        """Complete a record that was busy."""
        HEADER.pack_into(self._memory, place, RECORD.size, 0)
