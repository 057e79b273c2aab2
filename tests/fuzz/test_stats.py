"""Test statistics with any names and counters, and files with invalid statistics."""

import copy
import io
import json
import os
import re
import stat as stat_module
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from cleanfs.cache.cleancache import CleancacheStats
from cleanfs.cli import client
from cleanfs.cli.client import read_json, read_pid, read_stats, write_control, wrong_member
from cleanfs.cli.tables import stats_table
from cleanfs.cli.watch import watch_lines
from cleanfs.mount.config import MountError
from tests.fs.test_stats import STATS
from tests.harness.fuzzing import ARGUMENTS, examples

COUNTS = st.integers(0, 1 << 64)
VALID: dict[str, Any] = json.loads(STATS.as_json())


@given(
    source=ARGUMENTS,
    mountpoint=ARGUMENTS,
    counters=st.dictionaries(st.from_regex("[a-z][a-z_]{0,9}", fullmatch=True), COUNTS, max_size=4),
    counts=st.tuples(COUNTS, COUNTS, COUNTS, COUNTS, COUNTS),
)
@examples(40)
@example('a"b\\', "\n\\n\r", {}, (0, 0, 0, 0, 0))
@example("\udcff\x1b[31m", "{}=,", {"puts": 1}, (1 << 64, 0, 0, 0, 0))
def test_all_formats_agree_for_any_names(
    source: str, mountpoint: str, counters: dict[str, int], counts: tuple[int, ...]
) -> None:
    stats = replace(
        STATS,
        source=source,
        mountpoint=mountpoint,
        counters=counters,
        cleancache=CleancacheStats(*counts),
    )
    parsed = json.loads(stats.as_json())
    assert wrong_member(parsed) is None
    assert (parsed["source"], parsed["mountpoint"]) == (source, mountpoint)
    assert parsed["backend_counters"] == counters

    text = stats.as_text()
    lines = dict(line.split(" ", 1) for line in text.splitlines())
    assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert (int(lines["puts"]), int(lines["flushes"])) == counts[2:4]
    assert {name: int(lines[f"zcache_{name}"]) for name in counters} == counters

    families = {f.name: f for f in text_string_to_metric_families(stats.as_prometheus())}
    label = os.fsencode(mountpoint).decode(errors="replace")
    assert families["cleanfs_puts"].samples[0].labels == {"mountpoint": label}
    assert families["cleanfs_puts"].samples[0].value == float(counts[2])
    info = families["cleanfs_info"].samples[0].labels
    assert info["source"] == os.fsencode(source).decode(errors="replace")

    shown = rendered(parsed)
    assert all(line.isprintable() for line in shown.split("\n"))


def rendered(stats: dict[str, Any]) -> str:
    """Render the table for a terminal."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    console.print(stats_table(stats))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", ["[/x]", "[bold]", "[link=file:///etc]x", ":smile:", "[", "\\["])
def test_a_path_is_not_parsed_as_markup(name: str) -> None:
    assert f"/{name} on" in rendered(VALID | {"source": f"/{name}"})


def test_the_table_shows_how_files_are_identified_if_not_by_inode() -> None:
    text = rendered(VALID | {"identity": "inode", "pagecache_lost_files": 0})
    assert "known by" not in text
    assert "as no name led to them" not in text
    text = rendered(
        VALID | {"identity": "path", "pagecache_lost_files": 1, "pagecache_lost_pages": 12_345}
    )
    assert re.search(r"files are known by their +│ +path", text)
    assert re.search(r"pages lost, as no name led to them +│ +12,345", text)


# -- invalid statistics --------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=5),
    st.sampled_from(("", "1", "NaN", 10**400, "\x1b[2J", "[/x]", [], {}, [[]], {"a": 1})),
)  # fmt: skip

PATHS: list[tuple[str, ...]] = [
    *((name,) for name in VALID),
    *(("latencies", kind) for kind in VALID["latencies"]),
    *(("latencies", kind, name) for kind in VALID["latencies"] for name in ("sum_ns", "buckets_ns")),
    *(("backend_counters", name) for name in VALID["backend_counters"]),
]

MUTATIONS = st.lists(
    st.tuples(st.sampled_from(PATHS), st.one_of(st.just(...), SCALARS)), min_size=1, max_size=4
)


def mutated(changes: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    stats = copy.deepcopy(VALID)
    for path, value in changes:
        at: Any = stats
        for name in path[:-1]:
            at = at.get(name) if isinstance(at, dict) else None
        if isinstance(at, dict):
            if value is ...:
                at.pop(path[-1], None)
            else:
                at[path[-1]] = value
    return stats


@given(
    MUTATIONS,
    st.dictionaries(
        st.one_of(st.text(max_size=3), st.integers(-9, 1 << 70).map(str)), SCALARS, max_size=2
    ),
)
@examples(300)
@example([(("hit_ratio",), True)], {})
@example([(("pid",), 1.5)], {})
@example([(("uptime_seconds",), 10**400)], {})
@example([(("source",), "[/x]")], {})
@example([], {"-1": 3})
@example([], {str(1 << 70): 3})
@example([], {"8": 1.5})
def test_valid_statistics_can_be_shown(
    changes: list[tuple[tuple[str, ...], Any]], buckets: dict[str, Any]
) -> None:
    stats = mutated(changes)
    if buckets and isinstance(stats.get("latencies"), dict):
        stats["latencies"]["write"] = {"sum_ns": 1, "buckets_ns": buckets}
        if "pagecache_hit" in stats["latencies"]:
            stats["latencies"]["pagecache_hit"] = {"sum_ns": 1, "buckets_ns": buckets}
    if wrong_member(stats) is not None:
        return
    later = {**stats, "uptime_seconds": stats["uptime_seconds"] + 1}
    for before, now in ((VALID, stats), (stats, VALID), (stats, later)):
        for line in watch_lines(iter([before, now])):
            assert line.isprintable()
    assert all(line.isprintable() for line in rendered(stats).split("\n"))


@pytest.fixture
def control(tmp_path: Path) -> Path:
    """Make a control directory that no mount serves."""
    path = tmp_path / ".cleancache"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a control directory for all examples of a test."""
    path = tmp_path_factory.mktemp("place")
    (path / ".cleancache").mkdir()
    return path


@given(
    st.one_of(
        st.binary(max_size=60),
        st.integers(0, len(STATS.as_json())).map(lambda n: STATS.as_json()[:n].encode()),
        st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)).map(
            lambda value: json.dumps(value).encode()
        ),
        MUTATIONS.map(lambda changes: json.dumps(mutated(changes)).encode()),
    )
)
@examples(150)
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'{"pid": ' + b"9" * 5000 + b"}")
@example(b'{"hit_ratio": 1e999}')
@example(b'{"pid": NaN}')
@example(b"\xff\xfe{\0}\0")
@example(b"null")
def test_any_content_is_valid_statistics_or_one_error(place: Path, content: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            client, "forked_call", lambda call, _: call()
        )  # a child process for each example is slow
        any_content(place, content)


def any_content(place: Path, content: bytes) -> None:
    (place / ".cleancache" / "stats.json").write_bytes(content)
    try:
        stats = read_stats(str(place))
    except MountError as exc:
        assert "\n" not in str(exc)  # noqa: PT017  # other contents are valid
    else:
        assert wrong_member(stats) is None
    try:
        json.dumps(read_json(str(place)), allow_nan=False)
    except MountError:
        assert read_pid(str(place)) is None
    pid = read_pid(str(place))
    assert pid is None or pid > 0


ENTRIES: dict[str, Callable[[Path], object]] = {
    "a fifo": os.mkfifo,
    "an endless device": lambda path: os.mknod(path, stat_module.S_IFCHR | 0o666, os.makedev(1, 5)),
    "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to statistics": lambda path: path.symlink_to("../good"),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a loop": lambda path: path.symlink_to(path.name),
    "a directory": Path.mkdir,
    "a socket": lambda path: os.mknod(path, stat_module.S_IFSOCK | 0o666),
    "nothing": lambda _: None,
    "too much": lambda path: path.write_bytes(b" " * (2 << 20) + b"{}"),
    "a sparse terabyte": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_files_other_than_regular_ones_are_neither_read_nor_written(
    control: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "good").write_text(STATS.as_json())
    for name in ("stats.json", "drop"):
        try:
            ENTRIES[kind](control / name)
        except PermissionError:
            pytest.skip("making a device takes root")
    with pytest.raises((OSError, MountError)):
        read_stats(str(tmp_path))
    assert read_pid(str(tmp_path)) is None
    if kind not in ("too much", "a sparse terabyte"):
        with pytest.raises((OSError, MountError)):
            write_control(str(tmp_path), b"drop", "3\n")
    assert (tmp_path / "good").read_text() == STATS.as_json()
    assert not (control / "nowhere").exists()
    assert (control / "drop").exists() or kind in ("nothing", "a dangling link", "a loop")


def test_a_symlink_to_a_control_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "stats.json").write_text(STATS.as_json())
    (tmp_path / ".cleancache").symlink_to("other")
    with pytest.raises(NotADirectoryError):
        read_stats(str(tmp_path))


def test_a_write_does_not_truncate(control: Path) -> None:
    (control / "drop").write_text("precious")
    write_control(str(control.parent), b"drop", "3\n")
    assert (control / "drop").read_text() == "3\necious"
