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
