#!/bin/bash
# The page cache of a closed FUSE file dies with its dentry, where ext4 keeps the pages: reclaim of names alone
# (`echo 2 > /proc/sys/vm/drop_caches`) drops all data of such files, at one stroke.
#
# Linux 6.18.44, libfuse 3.14.0, pyfuse3 3.5.0, keep_cache=1 and timeouts of an hour. `2` frees "reclaimable slab objects
# (dentries and inodes)"; an inode with cached pages is not freed by it on ext4 while there is no want of memory, so its
# pages stay. A FUSE inode is dropped as soon as the last dentry goes (its super block has generic_delete_inode), with all
# its pages, and FORGET is sent. A file that is open keeps both. Needs root, for drop_caches and the comparison on ext4 in
# a loop device; drops the names that the machine has cached.
#
# Seen: "ext4: 256 pages before, 256 after", "FUSE: read again after it: ['READ 0+131072', ...], FORGET was sent",
# "FUSE, held open: nothing is read again"
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
import stat
import subprocess
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
        self.data = b"a" * (1 << 20)
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
        return pyfuse3.FileInfo(fh=1, direct_io=False, keep_cache=True)

    async def read(self, fh, offset, size):
        self.requests.append(f"READ {offset}+{size}")
        return self.data[offset : offset + size]

    async def release(self, fh):
        self.requests.append("RELEASE")

    async def forget(self, inodes):
        self.requests.append("FORGET")


def pages(path):
    done = subprocess.run(["fincore", "-nbo", "PAGES", path], capture_output=True, text=True, check=True)
    return int(done.stdout)


def drop_names():
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("2")


def program(fs):
    top = os.path.dirname(MNT)
    ext4 = f"{top}/ext4"
    os.mkdir(ext4)
    subprocess.run(["truncate", "-s", "64M", f"{top}/image"], check=True)
    subprocess.run(["mkfs.ext4", "-q", f"{top}/image"], check=True)
    subprocess.run(["mount", "-o", "loop", f"{top}/image", ext4], check=True)
    try:
        with open(f"{ext4}/f", "wb") as file:
            file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
        before = pages(f"{ext4}/f")
        drop_names()
        after = pages(f"{ext4}/f")
    finally:
        subprocess.run(["umount", ext4], check=True)
    print(f"ext4: {before} pages before, {after} after")
    assert before == after == 256

    def read():
        fs.requests.clear()
        with open(f"{MNT}/f", "rb") as file:
            assert len(file.read()) == 1 << 20
        return [request for request in fs.requests if request.startswith("READ")]

    assert read()
    assert not read()  # it is cached
    fs.requests.clear()
    drop_names()
    time.sleep(1)
    forgot = "FORGET" in fs.requests
    again = read()
    print(f"FUSE: read again after it: {again[:1]} ..., FORGET was{'' if forgot else ' not'} sent")
    assert forgot and again
    with open(f"{MNT}/f", "rb"):
        drop_names()
        assert not read()
    print("FUSE, held open: nothing is read again")


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
