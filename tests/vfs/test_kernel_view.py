"""Test the record of what the kernel was told of an inode."""

from cleanfs.vfs.kernel_view import NOT_TOLD, KernelView


def test_the_size_is_the_one_told_last_or_made_by_a_write() -> None:
    kernel = KernelView()
    assert kernel.size == NOT_TOLD
    kernel.written_to(170)
    kernel.written_to(40)
    assert kernel.size == 170
    before = kernel.told
    kernel.written_to(300)
    kernel.rollback(before)
    assert kernel.size == 170


async def test_a_short_read_moves_the_end_and_makes_the_size_doubtful() -> None:
    kernel, refreshes = KernelView(), 0

    async def refresh() -> None:
        nonlocal refreshes
        refreshes += 1

    kernel.written_to(16384)
    kernel.read_ended(16384)
    await kernel.settle(refresh, size=True)
    assert (kernel.size, refreshes) == (16384, 0)
    for _ in range(2):
        kernel.read_ended(8192)
        await kernel.settle(refresh, size=True)
    assert (kernel.size, refreshes) == (8192, 1)
    kernel.read_ended(16384)
    assert kernel.size == 8192
