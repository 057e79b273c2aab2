#!/bin/bash
# preadv2(2) with RWF_DONTCACHE leaves pages in the page cache: not those that it read, but the read-ahead that it started.
#
# Linux 6.18.44, ext4 (the flag is of Linux 6.14). "Uncached buffered I/O" is said to drop the pages once the data is
# copied, so one expects a cold file to be as cold afterwards. A read at offset 0 counts as the beginning of a sequential
# one: the kernel reads ahead, and what it read ahead is kept like any page. Elsewhere in the file nothing is left, nor
# with POSIX_FADV_RANDOM. How much depends on read_ahead_kb of the device: 128 here; with 2560 it was 48 pages. Needs
# root, for a loop device.
#
# Seen: "64 KiB at 0: 16 pages of 4 KiB are left", "64 KiB at 4 MiB: 0 pages", "64 KiB at 0, POSIX_FADV_RANDOM: 0 pages"
set -eu
work=$(mktemp -d)
trap 'umount "$work/mnt" 2>/dev/null || true; rm -rf "$work"' EXIT
[ "$(id -u)" = 0 ] || { echo "needs root" >&2; exit 2; }
mkdir "$work/mnt"
truncate -s 64M "$work/image"
mkfs.ext4 -q "$work/image"
mount -o loop "$work/image" "$work/mnt"
device=$(findmnt -no SOURCE "$work/mnt")
blockdev --setra 256 "$device" # 512 bytes each
cat >"$work/finding.py" <<'EOF'
import ctypes
import os
import struct
import sys
import time

RWF_DONTCACHE = 0x80
SYS_CACHESTAT = 451


def cached(fd):
    """Pages of a file that are cached."""
    result = ctypes.create_string_buffer(40)
    everything = struct.pack("QQ", 0, 0)
    assert ctypes.CDLL(None).syscall(SYS_CACHESTAT, fd, everything, result, 0) == 0
    return struct.unpack("5Q", result.raw)[0]


def left(path, offset, advice=None):
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached(fd) == 0
    if advice is not None:
        os.posix_fadvise(fd, 0, 0, advice)
    assert os.preadv(fd, [bytearray(65536)], offset, RWF_DONTCACHE) == 65536
    time.sleep(0.5)
    pages = cached(fd)
    os.close(fd)
    return pages


path = f"{sys.argv[1]}/f"
with open(path, "wb") as file:
    file.write(os.urandom(16 << 20))
    os.fsync(file.fileno())
at_0, inside = left(path, 0), left(path, 4 << 20)
random = left(path, 0, os.POSIX_FADV_RANDOM)
print(f"64 KiB at 0: {at_0} pages of 4 KiB are left")
print(f"64 KiB at 4 MiB: {inside} pages")
print(f"64 KiB at 0, POSIX_FADV_RANDOM: {random} pages")
assert at_0 > 0 == inside == random
EOF
timeout 60 python3 "$work/finding.py" "$work/mnt"
