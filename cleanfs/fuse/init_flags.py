"""Choose the flags of FUSE_INIT: what libfuse and pyfuse3 choose, and what they cannot.

The channel passes the kernel's request on to libfuse unchanged, and adds to libfuse's reply.
"""

from typing import Final

from cleanfs.fuse.protocol import (
    FUSE_AUTO_INVAL_DATA,
    FUSE_DONT_MASK,
    FUSE_EXPLICIT_INVAL_DATA,
    FUSE_FLAGS2,
    FUSE_HANDLE_KILLPRIV_V2,
    FUSE_IN_HEADER,
    FUSE_INIT_EXT,
    FUSE_INIT_IN,
    FUSE_INIT_IN_FLAGS2,
    FUSE_INIT_OUT,
    FUSE_INIT_OUT_FLAGS2,
    FUSE_OUT_HEADER,
    FUSE_PARALLEL_DIROPS,
    FUSE_SETXATTR_EXT,
)

WANTED: Final = {
    FUSE_DONT_MASK: (
        "leaves the umask to us: in a directory with a default ACL it must not apply (``Actor.mode``)"
    ),
    FUSE_PARALLEL_DIROPS: "lets lookups and listings of one directory run at a time",
    FUSE_HANDLE_KILLPRIV_V2: (
        "says in a WRITE that set-id bits must go. Without it the kernel asks for security.capability "
        "before each write; with it once for a file, and again after its attributes were refreshed"
    ),
    FUSE_SETXATTR_EXT: "says with an ACL that the set-gid bit must go, so that we need not find out",
}
"""The flags that every mount asks for, and what each does. Linux 3.2, 4.7, 5.11, 5.13."""

# Not asked for:
# * READDIRPLUS_AUTO: the kernel would request names alone after the first reply of a listing, until a
#   program looks one up. find(1) reads all names first: each would cost a LOOKUP (docs/metadata.md).
# * NO_OPENDIR_SUPPORT: an open directory holds a snapshot of its names (``DirHandle``), and permission
#   to list it is checked when it is opened.
# * CACHE_SYMLINKS: a kernel that keeps a target sends no request by which a change would be found,
#   where a symbolic link is known by its name.
# * POSIX_LOCKS and FLOCK_LOCKS: only with ``--locks source``. Otherwise the kernel keeps locks itself.

# FUSE_EXPLICIT_INVAL_DATA (Linux 5.2): the kernel drops pages only after an invalidation. libfuse
# asks for FUSE_AUTO_INVAL_DATA, with which it drops all pages of a file upon another mtime. Each
# write through the mount changes that, so a program that reads and writes a file in turn would never
# hit the kernel's cache.


def negotiate(request: bytes, reply: bytes, more: int = 0) -> tuple[bytes, int]:
    """Add to libfuse's reply to FUSE_INIT the flags that are WANTED, or in ``more``, and on offer.

    Returns the reply and the flags added. An error reply stays as it is.
    """
    body = FUSE_OUT_HEADER.size
    if len(request) < FUSE_IN_HEADER.size + FUSE_INIT_IN.size or len(reply) < body + FUSE_INIT_OUT.size:
        return reply, 0
    offered = _offered(request[FUSE_IN_HEADER.size :])
    _, error, _ = FUSE_OUT_HEADER.unpack_from(reply)
    major, minor, max_readahead, flags = FUSE_INIT_OUT.unpack_from(reply, body)
    if error or major != 7:
        return reply, 0
    added = offered & (more | _all(WANTED))
    if added & FUSE_EXPLICIT_INVAL_DATA:
        flags &= ~FUSE_AUTO_INVAL_DATA  # of the two the kernel would take this one
    changed = bytearray(reply)
    if added >> 32:
        flags |= FUSE_INIT_EXT
        [flags2] = FUSE_FLAGS2.unpack_from(reply, body + FUSE_INIT_OUT_FLAGS2)
        FUSE_FLAGS2.pack_into(changed, body + FUSE_INIT_OUT_FLAGS2, flags2 | added >> 32)
    low = (flags | added) & 0xFFFF_FFFF
    FUSE_INIT_OUT.pack_into(changed, body, major, minor, max_readahead, low)
    return bytes(changed), added


def _offered(request: bytes) -> int:
    """Return all 64 bits of a struct fuse_init_in."""
    *_, flags = FUSE_INIT_IN.unpack_from(request)
    if flags & FUSE_INIT_EXT and len(request) >= FUSE_INIT_IN_FLAGS2 + FUSE_FLAGS2.size:
        [flags2] = FUSE_FLAGS2.unpack_from(request, FUSE_INIT_IN_FLAGS2)
        flags |= flags2 << 32
    return int(flags)


def _all(flags: dict[int, str]) -> int:
    return sum(flags)  # they are different bits
