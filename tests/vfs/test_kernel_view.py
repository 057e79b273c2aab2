"""Test the record of the sizes that the kernel may know."""

import os
import stat as stat_module
from pathlib import Path

from cleanfs.vfs.inode import Inode
from cleanfs.vfs.kernel_view import MAX_SIZES


def regular() -> Inode:
    return Inode(1, 2, stat_module.S_IFREG, 3, 4)


def test_the_kernel_may_append_at_any_size_it_was_sent() -> None:
    inode = regular()
    for size in 100, 250, 250, 170:
        inode.kernel.size_sent(size)
    assert [at for at in (0, 99, 100, 170, 200, 250, 300) if inode.kernel.may_append(at, at + 7)] == [
        100,
        170,
        250,
    ]
    inode.kernel.truncated(40)
    assert [at for at in (0, 40, 100, 170) if inode.kernel.may_append(at, at + 7)] == [40]


def test_the_kernel_knows_the_size_after_its_own_writes() -> None:
    inode = regular()
    for size in 100, 250:
        inode.kernel.size_sent(size)
    inode.kernel.written_to(170)
    assert [at for at in (100, 170, 250) if inode.kernel.may_append(at, at + 7)] == [170, 250]
    inode.kernel.written_to(300)
    assert inode.kernel.sizes == (300,)


def test_whole_pages_before_the_end_come_from_a_mapping() -> None:
    inode = regular()
    for size in 4096, 8192:
        inode.kernel.size_sent(size)
    assert not inode.kernel.may_append(4096, 4096 + 4096)
    assert inode.kernel.may_append(8192, 8192 + 4096)
    inode.kernel.size_sent(100)
    assert inode.kernel.may_append(4096, 4096 + 4096)


def test_a_write_that_ends_within_a_page_and_not_at_the_end_is_an_append() -> None:
    """It may be an append at the end that the kernel knew before it learned of another append."""
    inode = regular()
    for size in 0, 4096, 4101:
        inode.kernel.size_sent(size)
    assert inode.kernel.may_append(4096, 4102)
    assert not inode.kernel.may_append(4096, 4101)
    assert not inode.kernel.may_append(4096, 8192)
    assert not inode.kernel.may_append(0, 7), "the process has cleared O_APPEND"


def test_a_size_that_was_never_sent_is_not_recorded() -> None:
    """The end of a write without O_APPEND at the beginning of the file was recorded as a size."""
    inode = regular()
    inode.kernel.size_sent(12_000)
    inode.kernel.written_to(4096)
    assert inode.kernel.sizes == (12_000,)
    assert not inode.kernel.may_append(4096, 5096)
    rolled_back = regular()
    rolled_back.kernel.rollback(regular().kernel.told)
    rolled_back.kernel.size_sent(5)
    rolled_back.kernel.rollback(regular().kernel.told)
    assert rolled_back.kernel.sizes == (5,)


def test_only_some_sizes_are_remembered() -> None:
    inode = regular()
    for size in range(1, 1000):
        inode.kernel.size_sent(size)
    assert len(inode.kernel.sizes) == MAX_SIZES


async def test_a_short_read_moves_the_end_and_makes_the_size_doubtful() -> None:
    kernel, refreshes = regular().kernel, 0

    async def refresh() -> None:
        nonlocal refreshes
        refreshes += 1

    kernel.size_sent(16384)
    kernel.read_ended(16384)
    await kernel.settle(refresh, size=True)
    assert (kernel.sizes, refreshes) == ((16384,), 0)
    for _ in range(2):
        kernel.read_ended(8192)
        await kernel.settle(refresh, size=True)
    assert (kernel.sizes, refreshes) == ((8192, 16384), 1)
    assert kernel.may_append(8192, 8196)
    kernel.read_ended(16384)
    assert kernel.sizes == (8192, 16384)


async def test_a_refresh_of_the_size_is_made_only_for_another_size(tmp_path: Path) -> None:
    kernel, refreshes = regular().kernel, 0

    async def refresh() -> None:
        nonlocal refreshes
        refreshes += 1

    for size, expected in (5, 0), (5, 0), (7, 1), (7, 1):
        (tmp_path / "f").write_bytes(b"x" * size)
        kernel.reply_sent((tmp_path / "f").stat())
        os.utime(tmp_path / "f", ns=(0, size))
        kernel.reply_sent((tmp_path / "f").stat())
        await kernel.settle(refresh, size=True)
        assert refreshes == expected
    await kernel.settle(refresh)
    assert refreshes == 2, "the times are doubtful too"
