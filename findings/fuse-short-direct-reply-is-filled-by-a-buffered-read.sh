#!/bin/bash
# A short reply to an O_DIRECT READ of FUSE does not end the read: the kernel asks for the rest by a buffered READ, whose
# pages stay in the page cache, and a later change is then not seen by buffered readers.
#
# Linux 6.18.44, libfuse 3.14.0, pyfuse3 3.5.0, default options. One expects O_DIRECT to leave no cached page, and a short
# reply to be a short read, as it is with direct_io. The VFS completes a short O_DIRECT read below the end of the file from
# the page cache (generic_file_read_iter), so read(2) gives all, and pages are left that O_DIRECT never invalidates. A short
# reply to a buffered READ is taken for the end of the file: the kernel lowers the size that it knows, and the next
# read there gives nothing, until attributes are asked for again.
#
# Seen: "O_DIRECT read: 8192 bytes, by ['READ 0+8192', 'READ 4096+4096']", "a page is cached: True",
# "buffered read of a short reply: 4096 bytes, then 0 bytes, though the file has 8192; after the attribute timeout 8192"
set -eu
work=$(mktemp -d)
trap 'umount -l "$work/mnt" 2>/dev/null || true; rm -rf "$work"' EXIT
[ "$(id -u)" = 0 ] || { echo "needs root" >&2; exit 2; }
dpkg -s libfuse3-dev fuse3 gcc pkg-config >/dev/null 2>&1 ||
    apt-get install -y -qq libfuse3-dev fuse3 gcc pkg-config >/dev/null
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install pyfuse3==3.5.0
mkdir "$work/mnt"
cat >"$work/finding.py" <<'EOF'
import ctypes
import errno
import mmap
import os
import stat
import sys
import time

import pyfuse3
import trio

MNT = sys.argv[1]


class OneFile(pyfuse3.Operations):
    """A file system with one file, ``f``, that notes the requests which it gets."""

    def __init__(self):
        super().__init__()
        self.requests = []
        self.data = b"a" * 8192
        self.size = len(self.data)
        self.mtime_ns = 1_000_000_000

    def entry(self, inode):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o644
        entry.st_size = 0 if inode == pyfuse3.ROOT_INODE else self.size
        entry.st_mtime_ns = entry.st_ctime_ns = self.mtime_ns
        entry.attr_timeout = entry.entry_timeout = 1
        return entry

    async def lookup(self, parent, name, ctx):
        if name != b"f":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.entry(2)

    async def getattr(self, inode, ctx):
        self.requests.append("GETATTR")
        return self.entry(inode)

    async def open(self, inode, flags, ctx):
        self.requests.append(f"OPEN {flags:#x}")
        return pyfuse3.FileInfo(fh=1, direct_io=False, keep_cache=True)

    async def read(self, fh, offset, size):
        self.requests.append(f"READ {offset}+{size}")
        return self.data[offset : offset + size]

    async def release(self, fh):
        self.requests.append("RELEASE")

    async def forget(self, inodes):
        self.requests.append("FORGET")


class ShortReplies(OneFile):
    """It replies with 4096 bytes at most, unless it is told otherwise."""

    most = 4096

    async def read(self, fh, offset, size):
        return (await super().read(fh, offset, size))[: self.most]


def cached(fd, offset):
    """Whether the page is cached, by mincore(2)."""
    mapping = mmap.mmap(fd, 8192, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + offset
    vector = ctypes.create_string_buffer(1)
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(4096), vector) == 0
    return bool(vector.raw[0] & 1)


def program(fs):
    fd = os.open(f"{MNT}/f", os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 8192)
    fs.requests.clear()
    count = os.preadv(fd, [buffer], 0)
    reads = [request for request in fs.requests if request.startswith("READ")]
    print(f"O_DIRECT read: {count} bytes, by {reads}")
    assert (count, reads) == (8192, ["READ 0+8192", "READ 4096+4096"])
    print(f"a page is cached: {cached(fd, 4096)}")
    assert cached(fd, 4096) and not cached(fd, 0)
    os.close(fd)

    fd = os.open(f"{MNT}/f", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    first, second = len(os.pread(fd, 8192, 0)), len(os.pread(fd, 4096, 4096))
    fs.most = 1 << 20
    time.sleep(1.2)
    later = len(os.pread(fd, 8192, 0))
    print(
        f"buffered read of a short reply: {first} bytes, then {second} bytes, though the file has 8192; "
        f"after the attribute timeout {later}"
    )
    assert (first, second, later) == (4096, 0, 8192)
    os.close(fd)


async def main(fs):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        await trio.to_thread.run_sync(program, fs)
        nursery.cancel_scope.cancel()


one_file = ShortReplies()
pyfuse3.init(one_file, MNT, {"fsname=finding"})
try:
    trio.run(main, one_file)
finally:
    pyfuse3.close()
EOF
timeout 60 "$work/venv/bin/python" "$work/finding.py" "$work/mnt"
