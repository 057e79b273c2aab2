"""Record which nodes' evicted pages are held back."""

from collections import Counter


class Holds:
    """Implements ``notify.EvictionHolds``."""

    def __init__(self) -> None:
        """Hold nothing."""
        self.held: Counter[int] = Counter()
        self.ever: list[int] = []

    def hold(self, node: int) -> None:
        self.held[node] += 1
        self.ever.append(node)

    def release(self, node: int) -> None:
        assert self.held[node] > 0, "never held"
        self.held[node] -= 1

    @property
    def nodes(self) -> list[int]:
        """Return the nodes that are held."""
        return sorted(+self.held)
