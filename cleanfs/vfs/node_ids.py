"""Node ids: the numbers that the kernel and the daemon call inodes by."""

import zlib
from collections.abc import Container
from itertools import count
from typing import Final

from cleanfs.source.errors import StaleError

ROOT: Final = 1
"""FUSE's node id of the root."""

DEVICE_SHIFT: Final = 48
"""Node ids of inodes on further file systems: ``nth device << 48 | inode number``."""

DYNAMIC_BASE: Final = 3 << 62
"""First of the node ids given where the derived one is taken."""

CONTROL_BASE: Final = 1 << 63
"""First of the node ids of the control directory; never given to an inode of the source."""

CONTROL_END: Final = CONTROL_BASE + (1 << 32)


class NodeIds:
    """Derives node ids from devices and inode numbers, where it can."""

    def __init__(self, device: int) -> None:
        """Number inodes of the root's ``device`` first."""
        self._device = device
        self._devices: dict[int, int] = {device: 0}  # st_dev -> order of appearance
        self._dynamic = count(DYNAMIC_BASE)

    def key(self, device: int, ino: int) -> int | tuple[int, int]:
        """Return a key for the pair: on the first file system the number, as a tuple takes 56 bytes."""
        return ino if self._devices.get(device) == 0 else (device, ino)

    def encode(self, device: int, ino: int, taken: Container[int]) -> int:
        """Return a unique node id; on the first file system the inode number itself, if it is free."""
        nth = self._devices.setdefault(device, len(self._devices))
        node = ino if nth == 0 else nth << DEVICE_SHIFT | ino
        if _is_derived(node) and (nth == 0 or ino < 1 << DEVICE_SHIFT) and node not in taken:
            return node
        return self.next_dynamic()

    def decode(self, node: int) -> tuple[int, int]:
        """Return the device and inode number of a derived node id. Raises StaleError."""
        if not _is_derived(node):
            raise StaleError
        nth = node >> DEVICE_SHIFT
        device = next((device for device, number in self._devices.items() if number == nth), None)
        if device is None or nth == 0:
            return self._device, node
        return device, node & ((1 << DEVICE_SHIFT) - 1)

    def next_dynamic(self) -> int:
        """Return a node id that no inode has, had or will have."""
        return next(self._dynamic)


def generation_of(handle: bytes) -> int:
    """Derive a 32-bit generation from the source's file handle; it lasts as long as the handle.

    Handles of two files that had one number differ in 32 consecutive bits, which a CRC always shows.
    """
    return zlib.crc32(handle)


def _is_derived(node: int) -> bool:
    return 1 < node < DYNAMIC_BASE and not CONTROL_BASE <= node < CONTROL_END
