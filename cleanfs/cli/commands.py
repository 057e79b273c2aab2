"""The command line. Wrong calls end with status 2, failures with 1, each with one line on stderr."""

import contextlib
import errno
import getopt
import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO, get_args

import click
from click.core import ParameterSource
from rich.console import Console

from cleanfs import __version__
from cleanfs.backends import codec
from cleanfs.backends.options import Admission, Allocator, Poor
from cleanfs.backends.zcache import engine_name
from cleanfs.cli.client import read_json, read_pid, read_stats, write_control
from cleanfs.cli.listing import as_table, mount_state
from cleanfs.cli.params import (
    BackendType,
    CompressionType,
    Microseconds,
    PageSizeType,
    PathType,
    Seconds,
    SizeType,
)
from cleanfs.cli.remount import cleanfs_mount, kernel_options, remount
from cleanfs.cli.tables import stats_table
from cleanfs.cli.watch import Stats, watch_lines
from cleanfs.fs.control import DROP_CLEANCACHE, DROP_PAGE_CACHE, NO_BACKEND
from cleanfs.linux.mounts import FS_TYPE, mount_points
from cleanfs.memory.cache_limits import oversize_warning
from cleanfs.memory.least_sizes import MIN_POOL_LIMIT, check_sizes
from cleanfs.memory.policy import Sizes
from cleanfs.mount.checks import check
from cleanfs.mount.config import LOG_LEVELS, MountConfig, MountError, OptionError
from cleanfs.mount.daemon import daemonise
from cleanfs.mount.mount import serve
from cleanfs.mount.mountpoint import is_dead, resolved, unmount
from cleanfs.mount.options import MountOptions, is_remount, parse
from cleanfs.printable import printable
from cleanfs.source.io import SourceCache
from cleanfs.vfs.coherency import ATTR_TIMEOUTS, Coherency

MIN_PAGE_SIZE = 4096

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main() -> NoReturn:
    """Entry point: run, and turn every failure into one line and a status."""
    _prepare_streams()
    status = _run()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python tries once more at the end, and makes the status 120 if that fails
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def _run() -> int:
    """Run the command; its status."""
    try:
        cli.main(standalone_mode=False, prog_name="cleanfs")
    except click.exceptions.NoArgsIsHelpError as exc:
        _say(exc.format_message())
        return 2
    except click.UsageError as exc:
        _complain(exc.format_message().removesuffix(".") + _usage_hint(exc))
        return 2
    except OptionError as exc:
        _complain(str(exc))
        return 2
    except click.ClickException as exc:
        _complain(exc.format_message())
        return 1
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads on; nothing to report
        return 1
    except MountError as exc:
        _complain(str(exc))
        return 1
    except OSError as exc:
        _complain(f"{exc.filename}: {exc.strerror}" if exc.filename and exc.strerror else str(exc))
        return 1
    return 0


def _usage_hint(exc: click.UsageError) -> str:
    """How the command is called, or where to read what it takes, if the message does not say it."""
    message = exc.format_message()
    if exc.ctx is None or "Did you mean" in message:
        return ""
    path = exc.ctx.command_path
    if message.startswith("No such"):
        return f" ({path} --help lists them)"
    if isinstance(exc, click.MissingParameter) or message.startswith("Got unexpected"):
        return f"; usage: {' '.join([path, *exc.ctx.command.collect_usage_pieces(exc.ctx)])}"
    return ""


def mount_helper() -> NoReturn:
    """``mount.cleanfs SPEC DIR [-sfnv] [-N NS] [-t TYPE] [-o OPTIONS]``, as mount(8) calls it.

    Turns into ``cleanfs mount``: -f (fake) does nothing, -n, -s and -v have no meaning here.
    """
    _prepare_streams()
    try:
        options, words = getopt.gnu_getopt(sys.argv[1:], "sfnvN:t:o:")
    except getopt.GetoptError as exc:
        _complain(str(exc))
        sys.exit(2)
    if ("-f", "") in options:
        sys.exit(0)
    given = [word for name, value in options if name == "-o" for word in ("-o", value)]
    sys.argv[1:] = ["mount", *given, "--", *words]
    main()


def _prepare_streams() -> None:
    """Have all three standard streams, and able to take any text.

    A descriptor that we were started without would be the next file's that is opened, and what is
    meant for the user would be written there.
    """
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):  # a write to 1 fails
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # the lowest free number: this one
    sys.stdout = sys.stdout or io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    sys.stderr = sys.stderr or io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _complain(message: str) -> None:
    _say("cleanfs: " + printable(" ".join(message.split())))


def _say(text: str) -> None:
    """On stderr; the status says it, too, to whoever cannot read it there."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _show_version(ctx: click.Context) -> None:
    try:
        engine = engine_name()
    except ValueError as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(f"cleanfs {__version__} (zcache engine: {engine})")
    ctx.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=lambda ctx, _, given: _show_version(ctx) if given else None,
    help="Show the version and exit.",
)
def cli() -> None:
    """Mount a directory through a compressed in-RAM cache of clean pages."""


@cli.command()
@click.argument("source", type=PathType())
@click.argument("mountpoint", type=PathType())
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground.")
@click.option(
    "--backend",
    type=BackendType(),
    default="zcache",
    show_default=True,
    help="Cache of evicted pages, or none.",
)
@click.option(
    "--pool-limit",
    type=SizeType(MIN_POOL_LIMIT),
    default="512M",
    show_default=True,
    help="RAM for the backend, metadata included.",
)
@click.option(
    "--page-cache",
    type=SizeType(MIN_PAGE_SIZE, zero=True),
    default="64M",
    show_default=True,
    help="RAM for uncompressed pages; 0 keeps none.",
)
@click.option(
    "--page-size",
    type=PageSizeType(MIN_PAGE_SIZE),
    default="4096",
    show_default=True,
    help="Power of two, 4K to 1M.",
)
@click.option(
    "--compression",
    type=CompressionType(),
    default="lz4",
    show_default=True,
    help=f"{codec.CHOICES}.",
)
@click.option(
    "--allocator",
    type=click.Choice(get_args(Allocator)),
    default="log",
    show_default=True,
    help="log: dense, append only; zbud: two pages to a frame.",
)
@click.option(
    "--poor",
    type=click.Choice(get_args(Poor)),
    help="Pages that compress poorly: keep them in spare room (log's default), or refuse them.",
)
@click.option(
    "--admission",
    type=click.Choice(get_args(Admission)),
    default="all",
    show_default=True,
    help="Who gets into a full pool: all pages, or only those that were seen before.",
)
@click.option(
    "--checksum/--no-checksum",
    default=False,
    show_default=True,
    help="Hold pages against a checksum when they come back from the backend.",
)
@click.option(
    "--shared-pool",
    type=click.UUID,
    metavar="UUID",
    help="Join the shared pool of that name: hits leave the page in it.",
)
@click.option("--allow-other", is_flag=True, help="Let other users in.")
@click.option("--read-only", is_flag=True, help="Refuse every change.")
@click.option(
    "--attr-timeout",
    type=Seconds(0, 86400),
    show_default="1, with --coherency none 86400",
    metavar="SECONDS",
    help="How long the kernel may believe names and attributes.",
)
@click.option(
    "--coherency",
    type=click.Choice([mode.value for mode in Coherency]),
    default="open",
    show_default=True,
    help="open: look for changes made to the source when a file is opened; watch: also have the kernel "
    "tell of them; none: there are none.",
)
@click.option(
    "--busy-poll",
    type=Microseconds(0, 10_000),
    default=50.0,
    show_default=True,
    metavar="MICROSECONDS",
    help="How long to look for the next request before sleeping, while they come fast; 0 never does.",
)
@click.option(
    "--source-cache",
    type=click.Choice([choice.value for choice in SourceCache]),
    default="auto",
    show_default=True,
    help="What reads leave in the source's page cache: what the kernel keeps, nothing, or (auto) "
    "nothing while something here keeps pages.",
)
@click.option(
    "--read-ahead",
    type=SizeType(MIN_PAGE_SIZE, zero=True),
    default="1M",
    show_default=True,
    help="How far the kernel reads ahead in the mount, as root; 0: not at all.",
)
@click.option(
    "--memory-pressure",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="Whether the caches yield while memory is short, or keep their configured limits.",
)
@click.option(
    "--writeback",
    is_flag=True,
    help="Let the kernel write later; needs --coherency none. A crash loses what is not synced.",
)
@click.option(
    "--log-file",
    type=PathType(),
    help="Append the log here (default: syslog in the background, stderr in the foreground).",
)
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS),
    default="info",
    show_default=True,
)
@click.option(
    "-o",
    "mount_options",
    multiple=True,
    metavar="NAME[=VALUE],...",
    help="The same options as mount(8) gives them.",
)
@click.pass_context
def mount(ctx: click.Context, /, mount_options: tuple[str, ...], **_: object) -> None:
    """Mount SOURCE on MOUNTPOINT."""
    mountpoint = resolved(ctx.params["mountpoint"])
    try:
        unchanged = kernel_options(mountpoint) if is_remount(mount_options) else ()
        options = parse(mount_options, unchanged)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    named = _take(ctx, options.ours)
    config = _config(ctx.params, mountpoint, options)
    try:
        check_sizes(config.pool_limit, config.page_cache, config.page_size)
        config.backend_options(config.pool_limit)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    if options.remount:
        remount(config, named, (*config.flags, "ro" if config.read_only else "rw"))
        return
    # A log that cannot be written is found out now.
    log_file = None if config.log_file is None else _open_log(ctx.params["log_file"])
    check(config)
    if log_file is not None or not ctx.params["foreground"]:  # else the log is where this would go
        pool = 0 if config.backend == NO_BACKEND else config.pool_limit
        configured = Sizes(pool, config.page_cache)
        if warning := oversize_warning(configured, yields=config.memory_pressure):
            _complain(f"warning: {warning}")
    level = config.log_level.upper()
    if ctx.params["foreground"]:
        _log_to(log_file, level, daemon=False)
        serve(config, lambda: None)
    else:
        keep = () if log_file is None else (log_file.fileno(),)
        daemonise(config, lambda: _log_to(log_file, level, daemon=True), *keep)


def _config(params: Mapping[str, Any], mountpoint: str, options: MountOptions) -> MountConfig:
    coherency = Coherency(params["coherency"])
    if params["writeback"] and coherency is not Coherency.NONE:
        raise click.UsageError(
            "--writeback needs --coherency none: a kernel that writes later takes no size from us"
        )
    attr_timeout, log_file = params["attr_timeout"], params["log_file"]
    access = [word for word in options.flags if word in ("ro", "rw")]
    return MountConfig(
        source=os.path.realpath(params["source"]),
        mountpoint=mountpoint,
        backend=params["backend"],
        pool_limit=params["pool_limit"],
        page_cache=params["page_cache"],
        page_size=params["page_size"],
        compression=params["compression"],
        allocator=params["allocator"],
        poor=params["poor"],
        admission=params["admission"],
        checksum=params["checksum"],
        shared_pool=params["shared_pool"],
        allow_other=params["allow_other"],
        read_only=access == ["ro"] if access else params["read_only"],
        attr_timeout=ATTR_TIMEOUTS[coherency] if attr_timeout is None else attr_timeout,
        coherency=coherency,
        writeback=params["writeback"],
        busy_poll_us=params["busy_poll"],
        source_cache=SourceCache(params["source_cache"]),
        read_ahead=params["read_ahead"],
        memory_pressure=params["memory_pressure"] == "auto",
        log_file=None if log_file is None else os.path.abspath(log_file),
        log_level=params["log_level"],
        flags=tuple(word for word in options.flags if word not in access),
        fuse_options=options.for_kernel,
    )


def _take(ctx: click.Context, words: Iterable[tuple[str, str | None]]) -> set[str]:
    """Set ``-o`` names as if they had been given as options; the names of all that were given."""
    ours = {param.name: param for param in ctx.command.params if param.name != "mount_options"}
    negated = {
        flag.lstrip("-").replace("-", "_"): str(param.name)
        for param in ctx.command.params
        for flag in param.secondary_opts
    }
    named = {
        str(name) for name in ours if ctx.get_parameter_source(str(name)) is ParameterSource.COMMANDLINE
    }
    for name, value in words:
        known_as = name.replace("-", "_")
        option = ours.get(negated.get(known_as, known_as))
        if not isinstance(option, click.Option):
            raise click.UsageError(f"unknown mount option {name!r}")
        if option.is_flag:
            if value is not None:
                raise click.UsageError(f"mount option {name!r} takes no value")
            ctx.params[str(option.name)] = known_as not in negated
        else:
            if value is None:
                raise click.UsageError(f"mount option {name!r} needs a value")
            ctx.params[str(option.name)] = option.type.convert(value, option, ctx)
        named.add(str(option.name))
    return named


def _open_log(path: str) -> TextIO:
    """Append to a log. Where it is a fifo, nobody waits: neither for its reader nor for room in it.

    Raises MountError.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)  # it names what is in the source
    except OSError as exc:
        directory = os.path.dirname(path) or "."
        missing = isinstance(exc, FileNotFoundError) and not os.path.isdir(directory)
        why = f"there is no directory {directory}" if missing else exc.strerror
        raise MountError(f"cannot write the log file {path}: {why}") from exc
    return os.fdopen(fd, "a", encoding="utf-8", errors="backslashreplace")


class LineFormatter(logging.Formatter):
    """A message is one line, whatever names are in it: none can look like another message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """The line; a traceback may follow."""
        return printable(super().formatMessage(record))


def _log_to(log_file: TextIO | None, level: str, *, daemon: bool) -> None:
    logging.raiseExceptions = False  # a log that is full is no reason to write a traceback elsewhere
    handler: logging.Handler
    if log_file is not None:
        handler = logging.StreamHandler(log_file)
    elif not daemon:
        handler = logging.StreamHandler()
    elif os.path.exists("/dev/log"):
        from logging.handlers import SysLogHandler

        handler = SysLogHandler("/dev/log")
        handler.ident = "cleanfs: "
    else:
        handler = logging.NullHandler()
    handler.setFormatter(LineFormatter(LOG_FORMAT))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # pyfuse3 logs its own comings and goings at every level.
    logging.getLogger("pyfuse3").setLevel(logging.WARNING)


@cli.command()
@click.argument("mountpoint", type=PathType())
@click.option("-l", "--lazy", is_flag=True, help="Detach now, end when nobody uses it any more.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT; its cached pages are discarded."""
    path = _cleanfs_mount(mountpoint)
    pid = read_pid(path)
    dead = pid is None and is_dead(path, seconds=1.0)
    unmount(path, lazy=lazy or dead)
    if pid is not None and not lazy:
        _wait_for_end(pid)


def _wait_for_end(pid: int, timeout_seconds: float = 10.0) -> None:
    """Wait until the daemon has gone: its memory is free when the command returns."""
    deadline = time.monotonic() + timeout_seconds
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """Whether a process is there and has not ended; its parent may not have waited for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@cli.command()
@click.argument("mountpoint", type=PathType())
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option(
    "--watch",
    type=Seconds(0.05, 86400),
    metavar="SECONDS",
    help="What happens, one line per interval.",
)
def stats(mountpoint: str, as_json: bool, watch: float | None) -> None:
    """Show the statistics of a mount."""
    path = _cleanfs_mount(mountpoint)
    if as_json and watch is None:
        with _asking(path):
            now = read_json(path)
        click.echo(json.dumps(now, indent=2))
    elif watch is None:
        with _asking(path):
            now = read_stats(path)
        _console().print(stats_table(now))
    else:
        snapshots = _snapshots(path, watch)
        for line in map(json.dumps, snapshots) if as_json else watch_lines(snapshots):
            click.echo(line)
            sys.stdout.flush()  # a pipe gets each line at once


def _console() -> Console:
    """A pipe has no width: nothing is folded or cut there."""
    return Console(width=None if sys.stdout.isatty() else 1000, markup=False, emoji=False)


def _snapshots(path: str, seconds: float) -> Iterator[Stats]:
    """The statistics now, and again after each interval, without end."""
    while True:
        with _asking(path):
            now = read_stats(path)
        yield now
        time.sleep(seconds)


@cli.command()
@click.argument("mountpoint", type=PathType())
@click.option(
    "--page-cache", is_flag=True, help="Only the page cache; cleancache may keep what it evicts."
)
@click.option("--cleancache", is_flag=True, help="Only what cleancache keeps.")
def drop(mountpoint: str, page_cache: bool, cleancache: bool) -> None:
    """Drop cached pages of a mount: page cache, cleancache, or (by default) both."""
    what = page_cache * DROP_PAGE_CACHE | cleancache * DROP_CLEANCACHE
    what = what or DROP_PAGE_CACHE | DROP_CLEANCACHE
    path = _cleanfs_mount(mountpoint)
    with _asking(path):
        write_control(path, b"drop", f"{what}\n")


@cli.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="A JSON array, with an object for each mount.")
def list_mounts(as_json: bool) -> None:
    """List the cleanfs mounts on this machine."""
    mounts = [mount_state(point) for point in mount_points() if point.fs_type == FS_TYPE]
    if as_json:
        click.echo(json.dumps([mount.as_json() for mount in mounts], indent=2))
    else:
        _console().print(as_table(mounts))


def _cleanfs_mount(path: str) -> str:
    """The absolute path of a cleanfs mount point. Raises MountError for anything else."""
    return cleanfs_mount(path).path


@contextlib.contextmanager
def _asking(path: str) -> Iterator[None]:
    """What it means when the control files of a mount cannot be read. Raises MountError."""
    try:
        yield
    except OSError as exc:
        advice = {
            errno.ENOTCONN: "its daemon has ended, and cleanfs umount takes the mount away",
            errno.ETIMEDOUT: "its daemon is stopped or busy, and cleanfs umount --lazy detaches it",
            errno.EACCES: "only who mounted it may look, unless it was mounted with --allow-other",
        }.get(exc.errno or 0)
        if advice is None:
            raise
        raise MountError(f"{path}: {exc.strerror}: {advice}") from exc
