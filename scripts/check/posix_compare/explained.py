"""Explain differences by limits of FUSE or of pyfuse3: each is a heading of docs/limits.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from .run import Difference


@dataclass(frozen=True, slots=True)
class Explanation:
    """Says which differences a heading explains."""

    heading: str
    case: str
    """Pattern of the cases' names."""
    aspect: str = "*"
    only_with: str = ""
    """An option of the mount without which there is no such difference."""
    only_without: str = ""

    def covers(self, difference: Difference) -> bool:
        """Tell whether it explains a difference."""
        return matches(difference.case, self.case) and matches(difference.aspect, self.aspect)

    def applies(self, options: Sequence[str]) -> bool:
        """Tell whether a mount with such options has the difference."""
        given = " ".join(options)
        return self.only_with in given and not (self.only_without and self.only_without in given)


EXPLANATIONS: Final = (
    Explanation("Access times", "data/*", "*: work/*: atime"),
    Explanation("Access times", "mappings/*", "*: work/*: atime"),
    Explanation("Access times", "space/*", "*: work/*: atime"),
    Explanation("Access times", "opens/*/file", "*: work/file: atime"),
    Explanation("Access times", "opens/*/to-file", "*: work/file: atime"),
    Explanation("Access times", "opens/* noatime/*", "*: work/*: atime"),
    Explanation("Access times", "*", "*: work/*: atime", only_with="--coherency none"),
    Explanation("Writes that the kernel keeps", "setid/*truncate to same", "*: ?time", "--writeback"),
    Explanation("Writes that the kernel keeps", "data/*truncate to 5120*", "*: ?time", "--writeback"),
    Explanation("Writes that the kernel keeps", "data/*1759218604*", "*", "--writeback"),
    Explanation("Writes that the kernel keeps", "space/*1759218604*", "*time", "--writeback"),
    Explanation("Writes that the kernel keeps", "attributes/utimensat *2446", "*time", "--writeback"),
    Explanation("Writes that the kernel keeps", "attributes/utimensat *2^40", "*time", "--writeback"),
    Explanation(
        "Writes that the kernel keeps", "attributes/utimensat *before 1901", "*time", "--writeback"
    ),
    Explanation("Times of fifos", "endpoints/fifo*", "*: work/fifo: ?time"),
    Explanation("fallocate", "space/fallocate collapse *"),
    Explanation("fallocate", "space/fallocate insert *"),
    Explanation("fallocate", "space/fallocate unshare *", "result*"),
    Explanation("One file system for the kernel", "borders/rename missing", "result"),
    Explanation("One file system for the kernel", "borders/rename file over directory", "result"),
    Explanation("One file system for the kernel", "borders/no replace", "result"),
    Explanation("One file system for the kernel", "borders/other device", "result"),
    Explanation("One file system for the kernel", "borders/mount point", "result"),
    Explanation("One file system for the kernel", "borders/statvfs", "result"),
    Explanation("The largest file", "data/lseek * 17592186044416/*", "result*"),
    Explanation("The largest file", "data/lseek * 9223372036854775807/*", "result*"),
    Explanation("The largest file", "data/seek, * at 17592186044416, *"),
    Explanation("The largest file", "data/seek, * at 922337203685477580?, *"),
    Explanation("Positions in directories", "data/lseek */dir", "result*"),
    Explanation("Flags of preadv2 and pwritev2", "data/readv and writev, nowait, *"),
    Explanation("Flags of preadv2 and pwritev2", "data/readv and writev, dontcache, *"),
    Explanation("O_DIRECT without alignment", "data/direct *"),
    Explanation("O_DIRECT without alignment", "opens/* direct/*"),
    Explanation("epoll on files", "endpoints/poll/file", "result*"),
    Explanation("Set-id bits and capabilities", "setid/capability */mapping", "*: xattrs"),
    Explanation("Set-id bits and capabilities", "setid/*/chown of nothing"),
)


def matches(text: str, pattern: str) -> bool:
    """Tell whether a pattern matches: it has ``*`` and ``?``, brackets are no special characters."""
    return fnmatchcase(text, pattern.replace("[", "[[]"))


def explain(difference: Difference, options: Sequence[str]) -> Explanation | None:
    """Return the first explanation of a difference."""
    for explanation in EXPLANATIONS:
        if explanation.applies(options) and explanation.covers(difference):
            return explanation
    return None
