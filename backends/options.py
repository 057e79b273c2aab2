"""The options that a backend is made with."""

from dataclasses import dataclass
from typing import Literal

Allocator = Literal["log", "zbud"]
"""How compressed pages are laid out in memory; see ``backends/native/log.hpp`` and ``zbud.hpp``."""

Poor = Literal["keep", "refuse"]
"""Whether a page that compresses poorly is kept raw, while there is room to spare, or refused."""

Admission = Literal["all", "was-active"]
"""Which pages a full pool admits: all, or only those that were kept or offered before."""


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """Holds the options of a backend. A backend raises ValueError for those it does not support."""

    pool_limit: int
    """Bytes of RAM, metadata included."""
    compression: str = "lz4"
    """The name of a codec, as ``codec.parse`` accepts it."""
    allocator: Allocator = "log"
    poor: Poor | None = None
    """None means ``keep`` if the allocator can, else ``refuse``."""
    admission: Admission = "all"
    checksum: bool = False
    """Whether to detect memory corruption and turn it into a miss. Costs 0.1 us of a get's 1.1."""

    def __post_init__(self) -> None:
        """Raise ValueError, with a message for the user, for options that contradict each other."""
        if self.allocator == "zbud" and self.poor == "keep":
            raise ValueError(
                "--allocator zbud needs --poor refuse: it has no room for pages that compress poorly"
            )
        if self.allocator == "zbud" and self.compression == "none":
            raise ValueError(
                "--allocator zbud needs a --compression: it keeps two pages in the room of one"
            )
