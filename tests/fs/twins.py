"""Make each request to two file systems over one source: one that the channel serves, and Python's."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cleanfs.fuse.session import native
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inode_state import InodeStates
from cleanfs.vfs.node_ids import ROOT
from tests.fs.metadata_rig import Entry, Reply, Side, Watch
from tests.harness.kernel import Device

needs_native = pytest.mark.skipif(
    native is None or not InodeStates.native, reason="the native modules were not built"
)


class Twins:
    """Makes each request to both file systems, and compares replies and states."""

    side: type[Side] = Side

    def __init__(
        self, source: Path, mode: Coherency, watch: Watch | None = None, *, exports: bool = False
    ) -> None:
        self.source = source
        self.device = Device()
        devices = (self.device, None)
        self.sides = [self.side(source, mode, device, watch, exports) for device in devices]
        self.now_ns = 0

    @property
    def natively(self) -> int:
        """Count the requests that the channel served."""
        return self.sides[0].natively

    async def both(self, call: str, *args: object) -> Reply:
        first, second = [await getattr(side, call)(*args) for side in self.sides]
        assert first == second, call
        self.compare()
        return first  # type: ignore[no-any-return]  # of a method by name

    def on_both(self, call: str, *args: object) -> None:
        for side in self.sides:
            getattr(side, call)(*args)
        self.compare()

    def compare(self) -> None:
        assert self.sides[0].state() == self.sides[1].state()

    def inodes(self, node: int) -> list[Inode]:
        return [side.table[node] for side in self.sides]

    def deliver(self) -> None:
        for side in self.sides:
            side.notifier.deliver()

    async def found(self, name: bytes, parent: int = ROOT) -> int:
        """Look a name up that is there. Return its node."""
        entry = await self.both("lookup", parent, name)
        assert isinstance(entry, Entry)
        return entry.node

    async def is_served(self, call: str, *args: object) -> bool:
        """Make a request to both. Return whether the channel served it."""
        before = self.natively
        await self.both(call, *args)
        return self.natively > before

    async def close(self) -> None:
        for side in self.sides:
            await side.close()
        self.device.close()


def make_source(path: Path) -> Path:
    for name in ("a", "b"):
        (path / name).write_text(name)
    (path / "link").symlink_to("a")
    (path / "dir").mkdir()
    (path / "dir" / "x").write_text("x")
    return path


@contextlib.asynccontextmanager
async def twins_over(
    path: Path, mode: Coherency, watch: Watch | None = None, *, exports: bool = False
) -> AsyncIterator[Twins]:
    twins = Twins(make_source(path), mode, watch, exports=exports)
    try:
        yield twins
    finally:
        await twins.close()
