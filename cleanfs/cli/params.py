"""Define the types of command-line options; each refuses a wrong value with one line."""

import math

import click

from cleanfs import backends
from cleanfs.backends import codec
from cleanfs.fs.control import NO_BACKEND
from cleanfs.sizes import format_size, parse_size

MAX_PAGE_SIZE = 1 << 20


class PathType(click.ParamType[str]):
    """Any path but the empty one, which the kernel refuses, too."""

    name = "path"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the path unchanged."""
        if not value:
            self.fail("an empty path names nothing", param, ctx)
        return str(value)


class SizeType(click.ParamType[int]):
    """A size option: at least ``least`` bytes, or zero where that has a meaning."""

    name = "size"

    def __init__(self, least: int, zero: bool = False) -> None:
        """Accept sizes from ``least`` bytes, and 0 if ``zero``."""
        self._least = least
        self._zero = zero

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the size in bytes."""
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
        """Return the size in bytes."""
        size = super().convert(value, param, ctx)
        if size & (size - 1) or size > MAX_PAGE_SIZE:
            self.fail(f"{value!r} is not a power of two from 4K to 1M", param, ctx)
        return size


class Duration(click.ParamType[float]):
    """A number in the unit ``name``."""

    def __init__(self, least: float, most: float) -> None:
        """Accept numbers from ``least`` to ``most``."""
        self._least = least
        self._most = most

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        try:
            duration = float(str(value))
        except ValueError:
            duration = math.nan
        if not self._least <= duration <= self._most:
            limits = f"{self._least:g} to {self._most:g}"
            self.fail(f"{value!r} is not a number of {self.name} from {limits}", param, ctx)
        return duration


class Seconds(Duration):
    """A number of seconds."""

    name = "seconds"


class Microseconds(Duration):
    """A number of microseconds."""

    name = "microseconds"


class BackendType(click.ParamType[str]):
    """The name of an installed backend, or none."""

    name = "backend"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name, checked."""
        known = [*backends.names(), NO_BACKEND]
        if value not in known:
            self.fail(f"unknown backend {value!r} (one of {', '.join(known)})", param, ctx)
        return str(value)


class CompressionType(click.ParamType[str]):
    """A compression that the codecs of our backends accept."""

    name = "compression"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the specification, checked."""
        try:
            codec.parse(str(value))
        except ValueError as exc:
            self.fail(str(exc), param, ctx)
        return str(value)
