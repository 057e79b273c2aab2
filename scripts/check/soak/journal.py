"""Keep what a process did last: a ring of lines in a file, there even if it hangs or is killed."""

import mmap
import time
from pathlib import Path

LINE = 200
LINES = 3000


class Journal:
    """Is one process' ring, mapped."""

    def __init__(self, path: Path) -> None:
        """Make the file."""
        with path.open("w+b") as file:
            file.truncate(LINE * LINES)
            self._map = mmap.mmap(file.fileno(), LINE * LINES)
        self._next = 0

    def note(self, text: str) -> None:
        """Note one line, with the time (monotonic, seconds)."""
        line = f"{time.monotonic():.6f} {text}".encode()[: LINE - 1].ljust(LINE - 1) + b"\n"
        at = self._next * LINE
        self._map[at : at + LINE] = line
        self._next = (self._next + 1) % LINES


def merged(directory: Path, word: str = "", last: int = 60) -> list[str]:
    """Return the last lines of all processes in the order of time, those with ``word`` only."""
    lines = []
    for path in sorted(directory.glob("process-*.log")):
        for line in path.read_bytes().split(b"\n"):
            text = line.decode("utf-8", "replace").rstrip("\0 ")
            if text.strip("\0 ") and word in text:
                when, _, rest = text.partition(" ")
                lines.append((float(when), f"{when} {path.stem}: {rest}"))
    return [text for _, text in sorted(lines)[-last:]]
