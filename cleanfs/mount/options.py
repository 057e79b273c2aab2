"""The words of ``-o`` that mount(8), fstab and libfuse know (docs/mounting.md)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cleanfs.linux.mounts import FS_TYPE
from cleanfs.mount.flags import FLAGS, last_of_each

ALIASES: Final = {"allow_suid": "suid", "allow_dev": "dev", "read_only": "ro", "read-only": "ro"}
"""mount(8) keeps ``suid`` and ``dev`` to itself, as they are what it takes for the default."""

WITHOUT_MEANING: Final = frozenset(
    {
        # mount(8), fstab and systemd have them for themselves.
        "defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "nousers",
        "owner", "noowner", "group", "nogroup", "comment", "helper", "uhelper",
        # Always so.
        "default_permissions", "user_xattr", "acl", "nomand", "nonempty",
        # FUSE keeps no change counter and prints nothing.
        "iversion", "noiversion", "silent", "loud",
    }
)  # fmt: skip
"""Taken, and nothing follows from them. So it is with all that begins with ``x-`` or ``X-``."""

SOURCE_DECIDES: Final = "owners and modes are the source's"
IS_DIRECTORY: Final = "the source is a directory"
KERNELS_OWN: Final = "FUSE itself tells the kernel"
COHERENCY_DECIDES: Final = "what the kernel keeps follows from coherency"

REFUSED: Final = {
    "uid": SOURCE_DECIDES,
    "gid": SOURCE_DECIDES,
    "umask": SOURCE_DECIDES,
    "fmask": SOURCE_DECIDES,
    "dmask": SOURCE_DECIDES,
    "nouser_xattr": "extended attributes are the source's",
    "noacl": "access control lists are the source's",
    "nodefault_permissions": "the kernel always checks permissions",
    "mand": "FUSE has no mandatory locks",
    "blkdev": IS_DIRECTORY,
    "loop": IS_DIRECTORY,
    "allow_root": "use allow_other, which lets nobody do more than the source's permissions do",
    "max_read": "libfuse agrees to no size but its own; use read_ahead",
    "kernel_cache": COHERENCY_DECIDES,
    "auto_cache": COHERENCY_DECIDES,
    "direct_io": COHERENCY_DECIDES,
    "entry_timeout": "attr_timeout is for names, too",
    "negative_timeout": "attr_timeout is for names, too",
    "fd": KERNELS_OWN,
    "rootmode": KERNELS_OWN,
    "user_id": KERNELS_OWN,
    "group_id": KERNELS_OWN,
}
"""Words that can not be honoured, and why."""

REMOUNT: Final = "remount"

SELINUX: Final = ("context", "fscontext", "defcontext", "rootcontext")
"""For SELinux. Where there is none, mount(8) drops them, and so do we."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What is left of ``-o`` for us to do something about."""

    remount: bool
    flags: tuple[str, ...]
    """Words of ``mountflags``, of each flag the last."""
    for_kernel: tuple[str, ...]
    ours: tuple[tuple[str, str | None], ...]
    """Names of our own options, or unknown ones, and their values."""


def parse(texts: Iterable[str], unchanged: Iterable[str] = ()) -> MountOptions:
    """Understand all ``-o`` of a call. Raises ValueError, with a message for the user.

    ``unchanged`` are words of the mount that a remount names again.
    """
    words = _split(texts)
    known = frozenset(unchanged)
    flags, for_kernel, ours = [], [], []
    for word in words:
        name, equals, value = word.partition("=")
        name = ALIASES.get(name, name)
        if name in FLAGS and not equals:
            flags.append(name)
        elif word in known or word == REMOUNT or name in WITHOUT_MEANING or name[:2] in ("x-", "X-"):
            continue
        elif (name in (*SELINUX, "fsname") and value) or word == "auto_unmount":
            for_kernel.append(word)
        elif name in REFUSED:
            raise ValueError(f"mount option {name!r} can not be had: {REFUSED[name]}")
        elif name == "subtype":
            if f"fuse.{value}" != FS_TYPE:
                raise ValueError(
                    "mount option 'subtype' is always 'cleanfs': it is how mounts are found"
                )
        else:
            ours.append((name, value if equals else None))
    return MountOptions(REMOUNT in words, last_of_each(flags), tuple(for_kernel), tuple(ours))


def asks_for_remount(texts: Iterable[str]) -> bool:
    """Whether a call is about a mount that there is already."""
    return REMOUNT in _split(texts)


def _split(texts: Iterable[str]) -> list[str]:
    """Split at commas, but for those within double quotes, as mount(8) does."""
    return re.findall(r'(?:"[^"]*"|[^,])+', ",".join(texts))
