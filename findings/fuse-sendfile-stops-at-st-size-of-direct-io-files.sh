#!/bin/bash
# sendfile(2) of a FUSE file that was opened with FOPEN_DIRECT_IO goes through the page cache and stops at st_size.
#
# Linux 6.18.44, libfuse 3.14.0, pyfuse3 3.5.0, Python 3.11. A file that is generated when it is read (statistics, as in
# /proc) commonly has direct_io and a size of 0: read(2) then asks the file system and gets all of it. One expects sendfile
# to do the same, or to fail as a hint to use read(2); `shutil.copyfile` copies a file of /proc well. On FUSE sendfile
# returns 0, so `shutil.copyfile` makes an empty file without an error, and never sends a READ. With the right st_size it
# copies all, by a READ of whole pages whose reply stays in the page cache: a second sendfile gives it again, where
# read(2) gets the new content.
#
# Seen: "read(2): 8192 bytes; copyfile with st_size 0: 0 bytes, requests []",
# "copyfile of /proc/version: as much as is read",
# "with st_size 8192: 8192 bytes; after a change read(2) gives b'b', sendfile b'a'"
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
import errno
import os
import shutil
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
        self.size = 0
        self.mtime_ns = 1_000_000_000

    def entry(self, inode):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o644
        entry.st_size = 0 if inode == pyfuse3.ROOT_INODE else self.size
        entry.st_mtime_ns = entry.st_ctime_ns = self.mtime_ns
        entry.attr_timeout = entry.entry_timeout = 0
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
        return pyfuse3.FileInfo(fh=1, direct_io=True, keep_cache=False)

    async def read(self, fh, offset, size):
        self.requests.append(f"READ {offset}+{size}")
        return self.data[offset : offset + size]

    async def release(self, fh):
        self.requests.append("RELEASE")

    async def forget(self, inodes):
        self.requests.append("FORGET")


def program(fs):
    copy = os.path.join(os.path.dirname(MNT), "copy")
    with open(f"{MNT}/f", "rb") as file:
        size_read = len(file.read())
    fs.requests.clear()
    shutil.copyfile(f"{MNT}/f", copy)
    reads = [request for request in fs.requests if request.startswith("READ")]
    empty = os.path.getsize(copy)
    print(f"read(2): {size_read} bytes; copyfile with st_size 0: {empty} bytes, requests {reads}")
    assert (size_read, empty, reads) == (8192, 0, [])

    shutil.copyfile("/proc/version", copy)
    with open("/proc/version", "rb") as version:
        assert os.path.getsize(copy) == len(version.read()) > 0
    print("copyfile of /proc/version: as much as is read")

    fs.size = 8192
    fd = os.open(f"{MNT}/f", os.O_RDONLY)
    target = os.open(copy, os.O_RDWR | os.O_TRUNC)
    assert os.fstat(fd).st_size == 8192
    whole = os.sendfile(target, fd, 0, 1 << 20)
    fs.data = b"b" * 8192
    by_read = os.pread(fd, 1, 0)
    os.lseek(target, 0, os.SEEK_SET)
    os.sendfile(target, fd, 0, 1 << 20)
    by_sendfile = os.pread(target, 1, 0)
    print(f"with st_size 8192: {whole} bytes; after a change read(2) gives {by_read}, sendfile {by_sendfile}")
    assert (whole, by_read, by_sendfile) == (8192, b"b", b"a")
    os.close(fd)
    os.close(target)


async def main(fs):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        await trio.to_thread.run_sync(program, fs)
        nursery.cancel_scope.cancel()


one_file = OneFile()
pyfuse3.init(one_file, MNT, {"fsname=finding"})
try:
    trio.run(main, one_file)
finally:
    pyfuse3.close()
EOF
timeout 60 "$work/venv/bin/python" "$work/finding.py" "$work/mnt"
