"""Test which file a refresh of the kernel's size takes, by its path on a plain file system."""

from pathlib import Path

import pytest

from cleanfs.fuse.size_sync import MountedAt, refresh_kernel_size


@pytest.mark.parametrize(
    ("path", "refreshed"),
    [(b"d/f", True), (b"d/other", False), (b"d/absent", False), (b"link", False), (b"d", False)],
)
def test_only_the_file_itself_is_refreshed_by_its_path(
    tmp_path: Path, path: bytes, refreshed: bool
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d/f")
    for name in "f", "other":
        (tmp_path / "d" / name).write_bytes(b"x")
    st = (tmp_path / "d" / "f").stat()
    assert refresh_kernel_size(MountedAt(str(tmp_path), st.st_dev), st.st_ino, 1, path) == refreshed
