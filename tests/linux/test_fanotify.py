"""Test the parser of fanotify events."""

import contextlib
import os
import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cleanfs.linux import fanotify, syscalls
from cleanfs.linux.fanotify import (
    FAN_CLOSE_WRITE,
    FAN_CREATE,
    FAN_MARK_ADD,
    FAN_MODIFY,
    FAN_ONDIR,
    FAN_Q_OVERFLOW,
    Event,
    Place,
    fsid,
    parse,
)


def info(kind: int, place: Place, name: bytes | None = None) -> bytes:
    """Make an information record, padded as the kernel does."""
    body = place.handle[4:]
    rest = body + (b"" if name is None else name + b"\0")
    rest += bytes(-len(rest) % 4)
    words = struct.unpack("=II", place.fsid.to_bytes(8, "little"))
    handle_type = int.from_bytes(place.handle[:4], "little", signed=True)
    return struct.pack("=BBHIIIi", kind, 0, 20 + len(rest), *words, len(body), handle_type) + rest


def event(mask: int, pid: int, *infos: bytes) -> bytes:
    """Make an event."""
    rest = b"".join(infos)
    return struct.pack("=IBBHQii", 24 + len(rest), 3, 0, 24, mask, -1, pid) + rest


FILE = Place(0x1122334455667788, struct.pack("=i", 1) + b"12345678")
DIRECTORY = Place(0x1122334455667788, struct.pack("=i", -2) + b"directory handle")

FID, DFID_NAME, DFID, PIDFD, OLD_DFID_NAME = 1, 2, 3, 4, 10


def test_a_write_event_names_the_file_its_directory_and_name() -> None:
    raw = event(FAN_MODIFY, 42, info(DFID_NAME, DIRECTORY, b"name"), info(FID, FILE))
    assert parse(raw) == [Event(FAN_MODIFY, 42, FILE, DIRECTORY, b"name")]


def test_a_create_event_names_the_directory() -> None:
    raw = event(FAN_CREATE, 42, info(DFID_NAME, DIRECTORY, b"a\xff\n"))
    assert parse(raw) == [Event(FAN_CREATE, 42, None, DIRECTORY, b"a\xff\n")]


@pytest.mark.parametrize("record", [info(DFID_NAME, DIRECTORY, b"."), info(DFID, DIRECTORY)])
def test_an_attribute_event_of_a_directory_has_it_as_subject(record: bytes) -> None:
    [found] = parse(event(fanotify.FAN_ATTRIB | FAN_ONDIR, 0, record))
    assert found.subject == DIRECTORY


def test_an_overflow_event_names_no_object() -> None:
    assert parse(event(FAN_Q_OVERFLOW, 0)) == [Event(FAN_Q_OVERFLOW, 0, None, None, b"")]


def test_unknown_information_records_are_skipped() -> None:
    unknown = struct.pack("=BBH", PIDFD, 0, 8) + b"\xff" * 4
    moved = info(OLD_DFID_NAME, DIRECTORY, b"old")
    raw = event(FAN_MODIFY, 1, unknown, moved, info(FID, FILE)) + event(FAN_MODIFY, 2)
    assert parse(raw) == [
        Event(FAN_MODIFY, 1, FILE, None, b""),
        Event(FAN_MODIFY, 2, None, None, b""),
    ]


def test_the_longer_metadata_of_a_later_kernel_is_skipped() -> None:
    raw = bytearray(event(FAN_MODIFY, 1, b"more", info(FID, FILE)))
    struct.pack_into("=H", raw, 6, 28)
    [found] = parse(bytes(raw))
    assert found.subject == FILE


@pytest.mark.parametrize(
    "raw",
    [
        b"\0",
        event(FAN_MODIFY, 1)[:-1],
        event(FAN_MODIFY, 1, info(FID, FILE))[:-1],
        struct.pack("=IBBHQii", 0, 3, 0, 24, 0, -1, 0),
        struct.pack("=IBBHQii", 24, 2, 0, 24, 0, -1, 0),
        struct.pack("=IBBHQii", 24, 3, 0, 0, 0, -1, 0),
        event(FAN_MODIFY, 1, struct.pack("=BBH", FID, 0, 0)),
        event(FAN_MODIFY, 1, struct.pack("=BBH", FID, 0, 4)),
        event(FAN_MODIFY, 1, struct.pack("=BBHIIIi", FID, 0, 20, 0, 0, 1, 1)),
        event(FAN_MODIFY, 1, b"abc"),
    ],
)
def test_a_malformed_event_is_an_error(raw: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the messages differ
        parse(raw)


places = st.builds(
    lambda number, kind, body: Place(number, struct.pack("=i", kind) + body),
    st.integers(0, 2**64 - 1),
    st.integers(-(2**31), 2**31 - 1),
    st.binary(max_size=128),
)
names = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name)
masks = st.integers(0, 2**64 - 1)
pids = st.integers(-(2**31), 2**31 - 1)


@given(st.lists(st.tuples(masks, pids, places, names, st.none() | places), max_size=20))
def test_events_round_trip(
    written: list[tuple[int, int, Place, bytes, Place | None]],
) -> None:
    raw = b"".join(
        event(
            mask,
            pid,
            info(DFID_NAME, where, name),
            *([] if subject is None else [info(FID, subject)]),
        )
        for mask, pid, where, name, subject in written
    )
    events = parse(raw)
    assert [(e.mask, e.pid, e.directory, e.name) for e in events] == [
        (mask, pid, where, name) for mask, pid, where, name, _ in written
    ]
    for found, (mask, _, where, _, subject) in zip(events, written, strict=True):
        assert found.subject == (subject or (where if mask & fanotify.OBJECT_CHANGED else None))


@given(st.binary(max_size=300))
@example(event(FAN_MODIFY, 1, info(FID, FILE)) * 3)
def test_garbage_is_parsed_or_refused(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse(raw)


@given(st.data())
def test_a_damaged_buffer_is_parsed_or_refused(data: st.DataObject) -> None:
    raw = bytearray(
        event(FAN_MODIFY, 1, info(DFID_NAME, DIRECTORY, b"name"), info(FID, FILE))
        + event(FAN_CREATE, 2, info(DFID_NAME, DIRECTORY, b"x"))
    )
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        for found in parse(cut):
            assert all(len(p.handle) >= 4 for p in (found.subject, found.directory) if p)
    except ValueError:
        pass


def test_a_real_event_carries_the_handle_of_its_file(tmp_path: Path) -> None:
    """Marking an inode needs no privilege."""
    try:
        group = fanotify.init()
    except OSError as exc:
        pytest.skip(f"fanotify_init: {exc}")
    try:
        path = tmp_path / "f"
        path.write_bytes(b"x")
        fanotify.mark(group, FAN_MARK_ADD, fanotify.OBJECT_CHANGED, str(path))
        path.write_bytes(b"y")
        [found] = parse(os.read(group, fanotify.MAX_EVENTS_BYTES))
        fd = os.open(path, os.O_PATH)
        handle = syscalls.event_handle(fd)
        os.close(fd)
        assert found.mask & FAN_MODIFY
        assert found.mask & FAN_CLOSE_WRITE
        assert found.pid == os.getpid()
        assert found.subject == Place(os.statvfs(path).f_fsid, handle)
        assert found.name == b"f"
        assert found.directory is not None
    finally:
        os.close(group)


def test_fsid_has_the_form_of_statvfs() -> None:
    assert fsid(*struct.unpack("=II", (0x1122334455667788).to_bytes(8, "little"))) in (
        0x1122334455667788,
        0x5566778811223344,
    )
