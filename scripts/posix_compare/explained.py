"""Differences that are limits of FUSE or of pyfuse3: each is a heading of docs/limits.md."""

from collections.abc import Sequence
from dataclasses import dataclass

from .groups import matches
from .run import Difference


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which differences a heading explains."""

    heading: str
    case: str
    """Pattern of the cases' names."""
    aspect: str = "*"
    only_with: str = ""
    """An option of the mount without which there is no such difference."""
    only_without: str = ""

    def covers(self, difference: Difference) -> bool:
        """Whether it explains a difference."""
        return matches_whole(difference.case, self.case) and matches_whole(
            difference.aspect, self.aspect
        )

    def applies(self, options: Sequence[str]) -> bool:
        """Whether a mount with such options has the difference."""
        given = " ".join(options)
        return self.only_with in given and not (self.only_without and self.only_without in given)


def matches_whole(text: str, pattern: str) -> bool:
    """``*`` and ``?`` only; no prefix."""
    return matches(text, pattern) if pattern.endswith("*") else matches(text + "\0", pattern + "\0")


EXPLANATIONS: tuple[Explanation, ...] = ()


def explain(difference: Difference, options: Sequence[str]) -> Explanation | None:
    """The first explanation of a difference."""
    for explanation in EXPLANATIONS:
        if explanation.applies(options) and explanation.covers(difference):
            return explanation
    return None
