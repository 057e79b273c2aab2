"""Parse ``-o`` with the options that mount(8), fstab and libfuse know (docs/mounting.md)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cleanfs.linux.mounts import FS_TYPE
from cleanfs.mount.flags import FLAGS, last_of_each

ALIASES: Final = {"allow_suid": "suid", "allow_dev": "dev", "read_only": "ro", "read-only": "ro"}
"""Other names of options. mount(8) does not pass on ``suid`` and ``dev``, which it takes for
defaults."""

WITHOUT_MEANING: Final = frozenset(
    {
        # For mount(8), fstab and systemd.
        "defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "nousers",
        "owner", "noowner", "group", "nogroup", "comment", "helper", "uhelper",
        # Always in force.
        "default_permissions", "user_xattr", "acl", "nomand", "nonempty",
        # FUSE has no change counter and prints nothing.
        "iversion", "noiversion", "silent", "loud",
    }
)  # fmt: skip
"""Options that are accepted and ignored, as are all that begin with ``x-`` or ``X-``."""

SOURCE_DECIDES: Final = "owners and modes are the source's"
IS_DIRECTORY: Final = "the source is a directory"
SET_BY_FUSE: Final = "libfuse sets it"
COHERENCY_DECIDES: Final = "coherency decides what the kernel caches"

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
    "allow_root": "use allow_other, under which the source's permissions still apply",
    "max_read": "libfuse allows no size but its own; use read_ahead",
    "kernel_cache": COHERENCY_DECIDES,
    "auto_cache": COHERENCY_DECIDES,
    "direct_io": COHERENCY_DECIDES,
    "entry_timeout": "attr_timeout applies to names, too",
    "negative_timeout": "attr_timeout applies to names, too",
    "fd": SET_BY_FUSE,
    "rootmode": SET_BY_FUSE,
    "user_id": SET_BY_FUSE,
    "group_id": SET_BY_FUSE,
}
"""Options that cannot be honoured, and why."""

REMOUNT: Final = "remount"

SELINUX: Final = ("context", "fscontext", "defcontext", "rootcontext")
"""Options of SELinux. Without SELinux, mount(8) drops them, and so do we."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """Holds the options of ``-o`` that have an effect."""

    remount: bool
    flags: tuple[str, ...]
    """Names in ``flags.FLAGS``, the last one of each flag."""
    for_kernel: tuple[str, ...]
    ours: tuple[tuple[str, str | None], ...]
    """Names and values of cleanfs's own options, and of unknown ones."""


def parse(texts: Iterable[str], unchanged: Iterable[str] = ()) -> MountOptions:
    """Parse all ``-o`` options of a command. Raises ValueError, with a message for the user.

    ``unchanged`` are options that the mount has, and that mount(8) repeats in a remount.
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
            raise ValueError(f"mount option {name!r} is refused: {REFUSED[name]}")
        elif name == "subtype":
            if f"fuse.{value}" != FS_TYPE:
                raise ValueError(
                    "mount option 'subtype' is always 'cleanfs': it is how mounts are found"
                )
        else:
            ours.append((name, value if equals else None))
    return MountOptions(REMOUNT in words, last_of_each(flags), tuple(for_kernel), tuple(ours))


def is_remount(texts: Iterable[str]) -> bool:
    """Return whether the options ask to change an existing mount."""
    return REMOUNT in _split(texts)


def _split(texts: Iterable[str]) -> list[str]:
    """Split at commas outside double quotes, as mount(8) does."""
    return re.findall(r'(?:"[^"]*"|[^,])+', ",".join(texts))
