"""Run the commands. A wrong call ends with status 2, a failure with 1, each with one line on stderr."""

import contextlib
import errno
import getopt
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import click

from cleanfs import __version__
from cleanfs.backends.zcache import engine_name
from cleanfs.cli.client import read_json, read_pid, read_stats, write_control
from cleanfs.cli.listing import as_table, mount_state
from cleanfs.cli.mount_command import mount
from cleanfs.cli.params import PathType, Seconds
from cleanfs.cli.remount import cleanfs_mount
from cleanfs.cli.streams import complain, make_console, prepare_streams, say
from cleanfs.cli.tables import stats_table
from cleanfs.cli.watch import Stats, watch_lines
from cleanfs.fs.control import DROP_CLEANCACHE, DROP_PAGE_CACHE
from cleanfs.linux.mounts import FS_TYPE, mount_points
from cleanfs.mount.config import MountError, OptionError
from cleanfs.mount.mountpoint import is_dead, unmount


def main() -> NoReturn:
    """Run ``cleanfs``, and turn every failure into one line and a status."""
    prepare_streams()
    status = _run()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python flushes again at exit, and sets status 120 if that fails
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def _run() -> int:
    """Run the command and return its status."""
    try:
        cli.main(standalone_mode=False, prog_name="cleanfs")
    except click.exceptions.NoArgsIsHelpError as exc:
        say(exc.format_message())
        return 2
    except click.UsageError as exc:
        complain(exc.format_message().removesuffix(".") + _usage_hint(exc))
        return 2
    except OptionError as exc:
        complain(str(exc))
        return 2
    except click.ClickException as exc:
        complain(exc.format_message())
        return 1
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has gone; there is nothing to report
        return 1
    except MountError as exc:
        complain(str(exc))
        return 1
    except OSError as exc:
        complain(f"{exc.filename}: {exc.strerror}" if exc.filename and exc.strerror else str(exc))
        return 1
    return 0


def _usage_hint(exc: click.UsageError) -> str:
    """Return the usage or where to find it, unless the message already helps."""
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
    """Run ``mount.cleanfs SPEC DIR [-sfnv] [-N NS] [-t TYPE] [-o OPTIONS]``, as mount(8) calls it.

    It becomes ``cleanfs mount``. With -f (fake) it does nothing; -n, -s and -v are ignored.
    """
    prepare_streams()
    try:
        options, words = getopt.gnu_getopt(sys.argv[1:], "sfnvN:t:o:")
    except getopt.GetoptError as exc:
        complain(str(exc))
        sys.exit(2)
    if ("-f", "") in options:
        sys.exit(0)
    given = [word for name, value in options if name == "-o" for word in ("-o", value)]
    sys.argv[1:] = ["mount", *given, "--", *words]
    main()


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


cli.add_command(mount)


@cli.command()
@click.argument("mountpoint", type=PathType())
@click.option("-l", "--lazy", is_flag=True, help="Detach now; end once the mount is no longer in use.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT; its cached pages are discarded."""
    path = _cleanfs_mount(mountpoint)
    pid = read_pid(path)
    dead = pid is None and is_dead(path, seconds=1.0)
    unmount(path, lazy=lazy or dead)
    if pid is not None and not lazy:
        _wait_for_end(pid)


def _wait_for_end(pid: int, timeout_seconds: float = 10.0) -> None:
    """Wait until the daemon has ended, so that its memory is free when the command returns."""
    deadline = time.monotonic() + timeout_seconds
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """Return whether a process is running; a zombie is not."""
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
    help="Show the activity, one line per interval.",
)
def stats(mountpoint: str, as_json: bool, watch: float | None) -> None:
    """Show the statistics of a mount."""
    path = _cleanfs_mount(mountpoint)
    if as_json and watch is None:
        with _control_errors(path):
            now = read_json(path)
        click.echo(json.dumps(now, indent=2))
    elif watch is None:
        with _control_errors(path):
            now = read_stats(path)
        make_console().print(stats_table(now))
    else:
        snapshots = _snapshots(path, watch)
        for line in map(json.dumps, snapshots) if as_json else watch_lines(snapshots):
            click.echo(line)
            sys.stdout.flush()  # a pipe gets each line at once


def _snapshots(path: str, seconds: float) -> Iterator[Stats]:
    """Yield the statistics now, and again after each interval, without end."""
    while True:
        with _control_errors(path):
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
    with _control_errors(path):
        write_control(path, b"drop", f"{what}\n")


@cli.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="A JSON array, with an object for each mount.")
def list_mounts(as_json: bool) -> None:
    """List the cleanfs mounts on this machine."""
    mounts = [mount_state(point) for point in mount_points() if point.fs_type == FS_TYPE]
    if as_json:
        click.echo(json.dumps([mount.as_json() for mount in mounts], indent=2))
    else:
        make_console().print(as_table(mounts))


def _cleanfs_mount(path: str) -> str:
    """Return the absolute path of a cleanfs mount point. Raises MountError if it is none."""
    return cleanfs_mount(path).path


@contextlib.contextmanager
def _control_errors(path: str) -> Iterator[None]:
    """Turn the errors of a mount's control files into advice. Raises MountError."""
    try:
        yield
    except OSError as exc:
        advice = {
            errno.ENOTCONN: "its daemon has ended, and cleanfs umount takes the mount away",
            errno.ETIMEDOUT: "its daemon is stopped or busy, and cleanfs umount --lazy detaches it",
            errno.EACCES: "only the user who mounted it may look, unless with --allow-other",
        }.get(exc.errno or 0)
        if advice is None:
            raise
        raise MountError(f"{path}: {exc.strerror}: {advice}") from exc
