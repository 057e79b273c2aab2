"""What a backend is asked to be."""

from dataclasses import dataclass
from typing import Literal

Allocator = Literal["log", "zbud"]
"""How compressed pages lie in memory: ``backends/native/log.hpp`` and ``zbud.hpp`` explain each."""

Poor = Literal["keep", "refuse"]
"""What becomes of a page that compresses poorly: kept as it is while there is room to spare, or not."""

Admission = Literal["all", "was-active"]
"""Who gets into a full pool: every page, or only one that was here, or was offered, before."""


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """Options that a backend is made with. One that can not follow them raises ValueError."""

    pool_limit: int
    """Bytes of RAM, metadata included."""
    compression: str = "lz4"
    """What ``codec.parse`` accepts."""
    allocator: Allocator = "log"
    poor: Poor | None = None
    """None is ``keep`` where the allocator can, else ``refuse``."""
    admission: Admission = "all"
    checksum: bool = False
    """Whether memory corruption is to be found out, and made a miss. Costs a get 0.1 us of 1.1."""

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
