"""Hold an inode table over a directory, and make lookups as the handlers do."""

import os
from pathlib import Path

import pytest

from cleanfs.linux.mounts import FileSystemTypes
from cleanfs.source.identity import Rules
from cleanfs.source.namespace import PATH_FLAGS
from cleanfs.source.space_retry import SpaceRetry
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.parking import open_parked

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def open_fds() -> set[int]:
    """Return the open fds of this process, without the one that lists them."""
    fds = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue
        fds.add(int(name))
    return fds


class Rig:
    """Holds a table over a directory, and makes lookups as the handlers do."""

    def __init__(self, path: Path, fd_budget: int = 100, max_inodes: int = 1000) -> None:
        self.path = path
        root_fd = os.open(path, PATH_FLAGS)
        self.table = InodeTable(root_fd, fd_budget, max_inodes, SpaceRetry(), Rules(FileSystemTypes()))
        os.close(root_fd)

    def lookup(self, name: str, parent: Inode | None = None) -> Inode:
        parent = parent or self.table.root
        fd = os.open(name, PATH_FLAGS, dir_fd=parent.fd)
        return self.table.looked_up(fd, os.fstat(fd), parent, name.encode())

    def list(self, name: str) -> Inode:
        return self.table.listed((self.path / name).lstat(), self.table.root, name.encode())

    def park(self, *inodes: Inode) -> None:
        """Park every inode that can be parked."""
        budget, self.table.fd_budget = self.table.fd_budget, 0
        self.table.shrink()
        self.table.fd_budget = budget
        assert all(inode.fd == -1 for inode in inodes)

    def reopen(self, inode: Inode, *, by_path: bool = False) -> Inode:
        """Reopen a parked inode as the file system does."""
        mount_fd = -1 if by_path else self.table.mount_fd(inode.device)
        parent_fd = self.table.root.fd if by_path else -1
        self.table.unpark(inode, *open_parked(inode, mount_fd, parent_fd))
        return inode

    def refers_to(self, inode: Inode, name: str) -> bool:
        return os.path.samestat(os.fstat(inode.fd), (self.path / name).lstat())
