#!/bin/bash
# FS_IOC_GETFLAGS (lsattr, overlayfs upon copy-up) on a FUSE file that is open sends another OPEN and RELEASE, with flags
# that no program can give, and what the reply says of cached pages is not done.
#
# Linux 6.18.44, libfuse 3.14.0, pyfuse3 3.5.0. An ioctl on a descriptor should use that open file. The kernel
# (fuse_priv_ioctl_prepare) opens the inode itself, O_RDONLY without O_LARGEFILE, which open(2) always adds on 64 bits; it
# sends no FLUSH; and although the reply has no FOPEN_KEEP_CACHE, which at any other open drops the pages of the inode, they
# stay. So a file system that finds out at open that the content has changed, and relies on that, leaves stale pages.
#
# Seen: "open(2): ['OPEN 0x8000', ...]", "ioctl, ENOTTY: ['OPEN 0x0', 'RELEASE']",
# "after the content has changed: ioctl, read b'a'; open(2), read b'b'"
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
import fcntl
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
        entry.attr_timeout = entry.entry_timeout = 3600
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
        return pyfuse3.FileInfo(fh=1, direct_io=False, keep_cache=False)

    async def read(self, fh, offset, size):
        self.requests.append(f"READ {offset}+{size}")
        return self.data[offset : offset + size]

    async def release(self, fh):
        self.requests.append("RELEASE")

    async def forget(self, inodes):
        self.requests.append("FORGET")


FS_IOC_GETFLAGS = 0x80086601


def getflags(fd):
    try:
        fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytearray(8))
    except OSError as exc:  # there is no handler for it
        assert exc.errno == errno.ENOTTY
    time.sleep(0.5)  # RELEASE comes by itself


def program(fs):
    fd = os.open(f"{MNT}/f", os.O_RDONLY)
    assert os.pread(fd, 1, 0) == b"a"
    print(f"open(2): {fs.requests}")
    assert int(fs.requests[0].split()[1], 16) == 0x8000, "O_LARGEFILE of x86-64"
    fs.requests.clear()
    getflags(fd)
    print(f"ioctl, ENOTTY: {fs.requests}")
    assert fs.requests == ["OPEN 0x0", "RELEASE"]
    fs.data = b"b" * 8192
    getflags(fd)
    after_ioctl = os.pread(fd, 1, 0)
    os.close(os.open(f"{MNT}/f", os.O_RDONLY))
    after_open = os.pread(fd, 1, 0)
    print(f"after the content has changed: ioctl, read {after_ioctl}; open(2), read {after_open}")
    assert (after_ioctl, after_open) == (b"a", b"b")
    os.close(fd)


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
