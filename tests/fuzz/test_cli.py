"""Test that any command line runs, or fails with one line and the right status."""

import io
import itertools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TextIO

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cleanfs.cli import commands, mount_command
from cleanfs.memory.least_sizes import check_sizes
from cleanfs.mount.config import MountConfig
from tests.harness.fuzzing import ARGUMENTS, NUMBERS, SIZES, examples


@dataclass
class Call:
    """Records what a run of the program did, up to the mount."""

    status: int
    out: str
    err: str
    configs: list[MountConfig] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)


def call(program: Callable[[], NoReturn], *args: str) -> Call:
    """Run the program in this process, without mounting or opening a log."""
    done = Call(-1, "", "")
    out, err = io.StringIO(), io.StringIO()

    def open_log(path: str) -> TextIO:
        done.logs.append(path)
        return io.StringIO()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cleanfs", *args])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setattr(mount_command, "check", lambda _: None)
        patch.setattr(commands, "mount_points", list)  # requests would keep other tests' mounts busy
        patch.setattr(mount_command, "daemonise", lambda config, _: done.configs.append(config))
        patch.setattr(mount_command, "serve", lambda config, _: done.configs.append(config))
        patch.setattr(mount_command, "open_log", open_log)
        patch.setattr(mount_command, "log_to", lambda *_, **__: None)
        with pytest.raises(SystemExit) as ended:
            program()
    assert isinstance(ended.value.code, int)
    done.status, done.out, done.err = ended.value.code, out.getvalue(), err.getvalue()
    return done


def check_outcome(done: Call) -> None:
    """Check the status and output that ``commands`` documents."""
    assert done.status in (0, 1, 2), done
    if done.status:
        assert not done.configs
        assert done.err.startswith(("cleanfs: ", "Usage: ")), done
        if not done.err.startswith("Usage: "):  # without a command, the help is printed
            assert done.err.endswith("\n")
            assert done.err[:-1].isprintable(), done
    else:
        assert done.err == ""
    for config in done.configs:
        check_sizes(config.pool_limit, config.page_cache, config.page_size)
        assert config.page_size in {1 << n for n in range(12, 21)}
        assert 0 <= config.attr_timeout <= 86400
        assert 0 <= config.busy_poll_us <= 10_000
        assert config.coherency.value == "none" or not config.writeback
        assert os.path.isabs(config.source)
        assert os.path.isabs(config.mountpoint)


ANY_SIZE = st.one_of(
    SIZES, st.sampled_from(("1M", "4K", "0", "4E", "1048575", "16384", "2M", "4863", "1M"))
)
CHOICES = ("log", "zbud", "keep", "refuse", "all", "was-active", "open", "none", "auto", "drop", "LOG",
           "", "info", "INFO", "debug", "zcache", "lo", "l\u00f6g")  # fmt: skip
VALUES = st.one_of(ANY_SIZE, NUMBERS, st.sampled_from(CHOICES), ARGUMENTS)
WITH_VALUE = ("--backend", "--pool-limit", "--page-cache", "--page-size", "--compression",
              "--allocator", "--poor", "--admission", "--shared-pool", "--attr-timeout",
              "--coherency", "--busy-poll",
              "--source-cache", "--read-ahead", "--log-file", "--log-level")  # fmt: skip
FLAGS = ("-f", "--foreground", "--checksum", "--no-checksum", "--allow-other", "--read-only",
         "--writeback")  # fmt: skip
WORDS = ("ro", "rw", "exec", "noexec", "dev", "nodev", "suid", "nosuid", "sync", "async", "atime",
         "noatime", "dirsync", "defaults", "auto", "noauto", "nofail", "user", "users", "_netdev",
         "x-a.b=c", "remount", "relatime", "nosymfollow", "uid=1", "user_id=0", "allow_suid",
         "fsname=x", 'context="a,b"', "subtype=cleanfs", "auto_unmount",
         "comment=x", "source", "mountpoint", "help", "version", "mount_options", "o", "f",
         "no-checksum")  # fmt: skip
O_WORDS = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from([flag.lstrip("-") for flag in FLAGS]),
    st.builds(
        "{}{}{}".format,
        st.sampled_from([name[2:].replace("-", sep) for name in WITH_VALUE for sep in "-_"]),
        st.sampled_from(("=", "=", "=", "", "==", " = ")),
        VALUES,
    ),
    ARGUMENTS,
)
OPTIONS = st.one_of(
    st.tuples(st.sampled_from(WITH_VALUE), VALUES),
    st.builds(lambda name, value: (f"{name}={value}",), st.sampled_from(WITH_VALUE), VALUES),
    st.sampled_from(FLAGS).map(lambda flag: (flag,)),
    st.lists(O_WORDS, max_size=4).map(lambda words: ("-o", ",".join(words))),
    ARGUMENTS.map(lambda text: (text,)),
    st.sampled_from((("--",), ("-",), ("-o",), ("-fo",), ("--help",), ("-h",), ("--pool",))),
)
PATHS = st.one_of(ARGUMENTS, st.sampled_from(("/nowhere/s", "s", ".", "..", "/", "//", "s/", "~", "-")))


def flat(parts: list[tuple[str, ...]]) -> list[str]:
    return list(itertools.chain.from_iterable(parts))


@given(st.lists(OPTIONS, max_size=5), st.lists(PATHS, min_size=1, max_size=3), st.booleans())
@examples(150)
@example([], ["", "m"], True)
@example([], ["s", ""], True)
@example([("--log-file", "")], ["s", "m"], False)
@example([("--pool-limit", "9" * 5000)], ["s", "m"], False)
@example([("--compression", "lz4:" + "9" * 5000)], ["s", "m"], False)
@example([("--pool-limit", "\x1b[2J\n\u202e")], ["s", "m"], False)
@example([("-o", "\udcff\r")], ["s", "m"], False)
def test_mount_runs_or_reports_an_error(
    options: list[tuple[str, ...]], paths: list[str], dashes: bool
) -> None:
    done = call(commands.main, "mount", *flat(options), *(["--"] if dashes else []), *paths)
    check_outcome(done)
    assert done.configs or done.status or "Usage:" in done.out
    bare = [words for words in options if words[0] in ("-", "--") or words[0][:1] != "-"]  # paths
    if (
        dashes
        and not bare
        and (len(paths) != 2 or "" in paths)
        and not {"-h", "--help"} & set(flat(options))
    ):
        assert done.status == 2


@given(
    st.sampled_from(("umount", "stats", "drop", "list", "mount", "", "moun", "-h", "--version")),
    st.lists(
        st.one_of(
            ARGUMENTS,
            st.sampled_from(
                ("--json", "--watch", "--lazy", "-l", "--page-cache", "--cleancache", "/", "")
            ),
            VALUES.map(lambda value: f"--watch={value}"),
        ),
        max_size=4,
    ),
)
@examples(150)
@example("umount", [""])
@example("stats", ["/proc"])
@example("stats", ["--watch=\u0663", "/"])
def test_every_command_runs_or_reports_an_error(command: str, args: list[str]) -> None:
    if command == "mount":
        args = args[:1]  # the test above covers more
    check_outcome(call(commands.main, command, *args))


@given(
    st.permutations(
        [("-s",), ("-n",), ("-v",), ("-o", "ro,noatime"), ("-t", "fuse.cleanfs"), ("s",), ("m",)]
    ),
    st.lists(st.lists(O_WORDS, max_size=4).map(lambda words: ("-o", ",".join(words))), max_size=2),
    st.lists(st.one_of(OPTIONS, st.just(("-f",)), st.just(("-N", "/proc/1/ns/mnt"))), max_size=1),
)
@examples(100)
def test_the_helper_runs_or_reports_an_error(
    parts: list[tuple[str, ...]], options: list[tuple[str, ...]], more: list[tuple[str, ...]]
) -> None:
    done = call(commands.mount_helper, *flat(parts), *flat(options), *flat(more))
    check_outcome(done)
    if not options and not more:
        assert done.status == 0
        assert {Path(path).name for c in done.configs for path in (c.source, c.mountpoint)} == {
            "s",
            "m",
        }
        assert [(c.read_only, c.flags) for c in done.configs] == [(True, ("noatime",))]


@given(st.lists(st.sampled_from(WORDS[:13]), max_size=8))
@examples(50)
@example(["exec", "noexec"])
@example(["noexec", "exec"])
@example(["ro", "rw"])
@example(["async", "sync", "dirsync"])
def test_the_last_of_contradicting_mount_options_wins(words: list[str]) -> None:
    done = call(commands.main, "mount", "-o", ",".join(words), "s", "m")
    [config] = done.configs
    last = {("sync" if word == "async" else re.sub("^no", "", word)): word for word in words}
    for_kernel = [word for word in last.values() if word not in ("ro", "rw")]
    assert sorted(config.flags) == sorted(for_kernel)
    assert config.read_only == ([word for word in words if word in ("ro", "rw")][-1:] == ["ro"])
