"""Types of command line options: what is wrong is refused with a line that says so."""

import math

import click

from cleanfs import backends
from cleanfs.backends import codec
from cleanfs.fs.control import NO_BACKEND
from cleanfs.sizes import format_size, parse_size

MAX_PAGE_SIZE = 1 << 20


class PathType(click.ParamType[str]):
    """A path of any kind. The empty one is none, as the kernel has it: not the current directory."""

    name = "path"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As it was given."""
        if not value:
            self.fail("an empty path names nothing", param, ctx)
        return str(value)


class SizeType(click.ParamType[int]):
    """A size option: at least ``least`` bytes, or zero where that has a meaning."""

    name = "size"

    def __init__(self, least: int, zero: bool = False) -> None:
        """See the class."""
        self._least = least
        self._zero = zero

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        if isinstance(value, int):
            return value
        try:
            size = parse_size(str(value))
        except ValueError as exc:
            self.fail(str(exc), param, ctx)
        if size < self._least and not (self._zero and size == 0):
            self.fail(f"{value!r} is below {format_size(self._least)}", param, ctx)
        return size


class PageSizeType(SizeType):
    """A power of two from 4 KiB to 1 MiB."""

    name = "page size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        size = super().convert(value, param, ctx)
        if size & (size - 1) or size > MAX_PAGE_SIZE:
            self.fail(f"{value!r} is not a power of two from 4K to 1M", param, ctx)
        return size


class Duration(click.ParamType[float]):
    """A number of the unit that ``name`` says, from ``least`` to ``most``."""

    def __init__(self, least: float, most: float) -> None:
        """See the class."""
        self._least = least
        self._most = most

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """In that unit."""
        try:
            duration = float(str(value))
        except ValueError:
            duration = math.nan
        if not self._least <= duration <= self._most:
            limits = f"{self._least:g} to {self._most:g}"
            self.fail(f"{value!r} is not a number of {self.name} from {limits}", param, ctx)
        return duration


class Seconds(Duration):
    """Seconds."""

    name = "seconds"


class Microseconds(Duration):
    """Microseconds."""

    name = "microseconds"


class BackendType(click.ParamType[str]):
    """An installed backend, or none."""

    name = "backend"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Its name."""
        known = [*backends.names(), NO_BACKEND]
        if value not in known:
            self.fail(f"unknown backend {value!r} (one of {', '.join(known)})", param, ctx)
        return str(value)


class CompressionType(click.ParamType[str]):
    """What the codecs of our backends accept."""

    name = "compression"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The specification, checked."""
        try:
            codec.parse(str(value))
        except ValueError as exc:
            self.fail(str(exc), param, ctx)
        return str(value)
