"""Define ``cleanfs mount``: its options, and the configuration made from them."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import click
from click.core import ParameterSource

from cleanfs.backends import codec
from cleanfs.backends.options import Admission, Allocator, Poor
from cleanfs.cli.log_setup import log_to, open_log
from cleanfs.cli.params import (
    BackendType,
    CompressionType,
    Microseconds,
    PageSizeType,
    PathType,
    Seconds,
    SizeType,
)
from cleanfs.cli.remount import kernel_options, remount
from cleanfs.cli.streams import complain
from cleanfs.fs.control import NO_BACKEND
from cleanfs.fuse.transport import Transport
from cleanfs.memory.cache_limits import oversize_warning
from cleanfs.memory.least_sizes import MIN_POOL_LIMIT, check_sizes
from cleanfs.memory.policy import Sizes
from cleanfs.mount.checks import check
from cleanfs.mount.config import LOG_LEVELS, MountConfig
from cleanfs.mount.daemon import daemonise
from cleanfs.mount.mount import serve
from cleanfs.mount.mountpoint import resolved
from cleanfs.mount.options import MountOptions, is_remount, parse
from cleanfs.source.io import SourceCache
from cleanfs.vfs.coherency import ATTR_TIMEOUTS, Coherency
from cleanfs.vfs.evictions import EvictionSource
from cleanfs.vfs.source_locks import Locks

MIN_PAGE_SIZE = 4096


@click.command()
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
    help="Poorly compressible pages: keep them in spare memory (log's default), or refuse them.",
)
@click.option(
    "--admission",
    type=click.Choice(get_args(Admission)),
    default="all",
    show_default=True,
    help="Which pages enter a full pool: all, or only those that were seen before.",
)
@click.option(
    "--checksum/--no-checksum",
    default=False,
    show_default=True,
    help="Verify a checksum of pages that come back from the backend.",
)
@click.option(
    "--shared-pool",
    type=click.UUID,
    metavar="UUID",
    help="Join the shared pool of that name; a hit leaves the page in it.",
)
@click.option("--allow-other", is_flag=True, help="Let other users in.")
@click.option("--read-only", is_flag=True, help="Refuse every change.")
@click.option(
    "--attr-timeout",
    type=Seconds(0, 86400),
    show_default="1, with --coherency none 86400",
    metavar="SECONDS",
    help="Attribute and entry timeout: how long the kernel caches names and attributes.",
)
@click.option(
    "--coherency",
    type=click.Choice([mode.value for mode in Coherency]),
    default="open",
    show_default=True,
    help="How changes made to the source are noticed. open: checked when a file is opened; watch: also "
    "reported by the kernel (fanotify); none: the source never changes.",
)
@click.option(
    "--transport",
    type=click.Choice([choice.value for choice in Transport]),
    default="auto",
    show_default=True,
    help="How requests come from the kernel. device: the main thread reads them; uring: a queue and a "
    "thread for each processor (FUSE over io_uring); auto: device.",
)
@click.option(
    "--busy-poll",
    type=Microseconds(0, 10_000),
    default=50.0,
    show_default=True,
    metavar="MICROSECONDS",
    help="How long to poll for the next request before sleeping, while they come fast; 0: never.",
)
@click.option(
    "--source-cache",
    type=click.Choice([choice.value for choice in SourceCache]),
    default="auto",
    show_default=True,
    help="Whether reads populate the source's page cache: keep, drop, or auto (drop while cleanfs "
    "caches pages itself).",
)
@click.option(
    "--read-ahead",
    type=SizeType(MIN_PAGE_SIZE, zero=True),
    default="1M",
    show_default=True,
    help="How far the kernel reads ahead in the mount (set by root only); 0: not at all.",
)
@click.option(
    "--memory-pressure",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="auto: the caches shrink while memory is short; off: they keep their configured limits.",
)
@click.option(
    "--evictions",
    type=click.Choice([choice.value for choice in EvictionSource]),
    default="auto",
    show_default=True,
    help="Whose evictions fill the pool. kernel: those of the kernel's page cache, which takes root; "
    "own: those of --page-cache; auto: the kernel's where possible.",
)
@click.option(
    "--writeback",
    is_flag=True,
    help="Let the kernel write back later; needs --coherency none. A crash loses unsynced writes.",
)
@click.option(
    "--locks",
    type=click.Choice([choice.value for choice in Locks]),
    default="local",
    show_default=True,
    help="Where programs' locks are held. local: in the kernel, for this mount; source: in the source, "
    "where other programs see them.",
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
    help="The same options, in the form of mount(8).",
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
    # Fail now if the log cannot be written.
    log_file = None if config.log_file is None else open_log(ctx.params["log_file"])
    check(config)
    if log_file is not None or not ctx.params["foreground"]:  # else the log has the same line
        pool = 0 if config.backend == NO_BACKEND else config.pool_limit
        configured = Sizes(pool, config.page_cache)
        if warning := oversize_warning(configured, yields=config.memory_pressure):
            complain(f"warning: {warning}")
    level = config.log_level.upper()
    if ctx.params["foreground"]:
        log_to(log_file, level, daemon=False)
        serve(config, lambda: None)
    else:
        keep = () if log_file is None else (log_file.fileno(),)
        daemonise(config, lambda: log_to(log_file, level, daemon=True), *keep)


def _config(params: Mapping[str, Any], mountpoint: str, options: MountOptions) -> MountConfig:
    coherency = Coherency(params["coherency"])
    if params["writeback"] and coherency is not Coherency.NONE:
        raise click.UsageError(
            "--writeback needs --coherency none: a kernel that writes back later accepts no file sizes"
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
        locks=Locks(params["locks"]),
        transport=Transport(params["transport"]),
        evictions=EvictionSource(params["evictions"]),
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
    """Apply ``-o`` options like command-line options, and return the names of all that were given."""
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
