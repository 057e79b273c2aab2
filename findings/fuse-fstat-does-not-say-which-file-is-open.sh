#!/bin/bash
# fstat, fchmod and fchown of an open FUSE file send no file handle: a server cannot tell them from stat, chmod and
# chown by a name. ftruncate does send one.
#
# Linux 6.18.44, libfuse 3.14.0, mfusepy 3.0.0. FUSE_GETATTR has a field and a flag for the handle (FUSE_GETATTR_FH), and
# FUSE_SETATTR too (FATTR_FH), and libfuse documents "fi will be NULL if the file is not currently open". But the kernel's
# fuse_getattr has no open file to pass on (vfs_getattr takes a path), and chmod_common and chown_common set no ATTR_FILE.
# So a server that keeps a removed file only under its handle (no hidden name) fails fstat of it, and one that wants to
# refuse calls by a name which is gone must not refuse those of a descriptor that look the same.
#
# Seen: "fstat: ['getattr None']", "fchmod: ['chmod None', 'getattr None']",
# "fchown: ['getattr None', 'chown None', 'getattr None']", "ftruncate: ['truncate 77', 'getattr 77']"
set -eu
work=$(mktemp -d)
trap 'umount -l "$work/mnt" 2>/dev/null || true; rm -rf "$work"' EXIT
[ "$(id -u)" = 0 ] || { echo "needs root" >&2; exit 2; }
dpkg -s libfuse3-3 fuse3 >/dev/null 2>&1 || apt-get install -y -qq libfuse3-3 fuse3 >/dev/null
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install mfusepy==3.0.0
mkdir "$work/mnt"
cat >"$work/server.py" <<'EOF'
import errno
import stat
import sys

import mfusepy


class OneFile(mfusepy.Operations):
    """A file system with one file, ``f``, whose handle is 77. Prints what it is asked, and of which handle."""

    use_ns = True

    def note(self, what, fh):
        print(what, fh, flush=True)
        return 0

    def getattr(self, path, fh=None):
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        if path != "/f":
            raise mfusepy.FuseOSError(errno.ENOENT)
        self.note("getattr", fh)
        return {"st_mode": stat.S_IFREG | 0o644, "st_size": 4, "st_nlink": 1}

    def open(self, path, flags):
        return 77

    def truncate(self, path, length, fh=None):
        return self.note("truncate", fh)

    def chmod(self, path, mode, fh=None):
        return self.note("chmod", fh)

    def chown(self, path, uid, gid, fh=None):
        return self.note("chown", fh)


mfusepy.FUSE(OneFile(), sys.argv[1], foreground=True, attr_timeout=0, entry_timeout=60)
EOF
cat >"$work/program.py" <<'EOF'
import os
import sys
import time

mnt, log = sys.argv[1:]
deadline = time.monotonic() + 20
while not os.path.ismount(mnt):
    assert time.monotonic() < deadline
    time.sleep(0.05)
fd = os.open(f"{mnt}/f", os.O_RDWR)


def asked(call):
    """What a call makes the server say."""
    start = os.stat(log).st_size
    call()
    with open(log) as said:
        said.seek(start)
        lines = said.read().splitlines()
    print(f"{call.__name__}: {lines}")
    return lines


def fstat():
    os.fstat(fd)


def fchmod():
    os.fchmod(fd, 0o600)


def fchown():
    os.fchown(fd, 1, 1)


def ftruncate():
    os.ftruncate(fd, 4)


assert asked(fstat) == ["getattr None"]
assert "chmod None" in asked(fchmod)
assert "chown None" in asked(fchown)
assert "truncate 77" in asked(ftruncate)
EOF
timeout 60 "$work/venv/bin/python" "$work/server.py" "$work/mnt" >"$work/log" &
timeout 40 python3 "$work/program.py" "$work/mnt" "$work/log"
