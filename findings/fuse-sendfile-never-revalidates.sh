#!/bin/bash
# sendfile(2) and mappings of an open FUSE file never ask for attributes again: an attribute timeout that has run out, by
# which read(2) notices a change within the second, means nothing to them.
#
# Linux 6.18.44, libfuse 3.14.0, pyfuse3 3.5.0. The file system changes the content and the mtime of a file that a program
# (a web server with open files) has open and cached, with attr_timeout=0.2. With AUTO_INVAL_DATA, on by default, one
# expects to see the change after 0.2 s whatever call is used. sendfile and a mapping go on giving the old bytes, and no
# request is sent. One read(2), by anybody, sends GETATTR, drops the pages, and then all three are right.
#
# Seen: "1 s after the change: sendfile b'a', mapping b'a', requests []",
# "read(2): b'b', requests ['GETATTR', ...]", "then: sendfile b'b', mapping b'b'"
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
        entry.attr_timeout = entry.entry_timeout = 0.2
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


def program(fs):
    fd = os.open(f"{MNT}/f", os.O_RDONLY)
    mapping = mmap.mmap(fd, 8192, mmap.MAP_SHARED, mmap.PROT_READ)
    target = os.open(os.path.join(os.path.dirname(MNT), "copy"), os.O_RDWR | os.O_CREAT)

    def sent():
        os.lseek(target, 0, os.SEEK_SET)
        os.sendfile(target, fd, 0, 8192)
        return os.pread(target, 1, 0)

    assert (os.pread(fd, 1, 0), sent(), mapping[:1]) == (b"a", b"a", b"a")
    fs.data, fs.mtime_ns = b"b" * 8192, 2_000_000_000
    fs.requests.clear()
    time.sleep(1)
    by_sendfile, by_mapping = sent(), mapping[:1]
    print(f"1 s after the change: sendfile {by_sendfile}, mapping {by_mapping}, requests {fs.requests}")
    assert (by_sendfile, by_mapping, fs.requests) == (b"a", b"a", [])
    by_read = os.pread(fd, 1, 0)
    print(f"read(2): {by_read}, requests {fs.requests}")
    assert by_read == b"b"
    assert fs.requests[0] == "GETATTR"
    by_sendfile, by_mapping = sent(), mapping[:1]
    print(f"then: sendfile {by_sendfile}, mapping {by_mapping}")
    assert (by_sendfile, by_mapping) == (b"b", b"b")
    mapping.close()
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
