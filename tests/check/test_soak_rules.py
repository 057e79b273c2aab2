"""Test that the rules of check/soak find wrong data and accept legal data."""

import os
from itertools import chain, repeat
from pathlib import Path

import pytest

from scripts.check.soak.content import CELL, bound, cell_at, cell_bytes, cells_bytes
from scripts.check.soak.locks import Locks
from scripts.check.soak.model import RING, Model, Shape
from scripts.check.soak.plan import Plan
from scripts.check.soak.process import Handle, IllegalError, Process
from scripts.check.soak.rules import Violation, check_data, check_length, check_size, staleness

FILE = 7
SHAPE = Shape(slots=3, names=2, processes=2, cells=8)


def data(*versions: int, shift: int = CELL, first: int = 0, file: int = FILE) -> bytes:
    """Make cells with these versions."""
    return cells_bytes(file, shift, first, list(versions))


def check(read: bytes, floor: list[int], begun: list[int], offset: int = 0) -> str:
    """Return the fault of a read of aligned cells from the first one on, or none if it is legal."""
    found = check_data(FILE, CELL, offset, read, floor, begun)
    return "" if found is None else found.what


def test_cells_are_adjacent() -> None:
    for shift in (1, 17, 1000, CELL):
        assert [bound(cell, shift) for cell in range(3)] == [0, shift, shift + CELL]
        for offset in range(3 * CELL):
            cell = cell_at(offset, shift)
            assert bound(cell, shift) <= offset < bound(cell + 1, shift)


def test_written_data_is_legal_for_any_range_of_a_read() -> None:
    whole = data(2, 4, 3, 0)
    for start in (0, 1, 500, CELL, 2 * CELL + 7):
        for stop in (start + 1, 2 * CELL + 9, 4 * CELL):
            first, last = start // CELL, (stop - 1) // CELL + 1
            versions = [2, 4, 3, 0][first:last]
            assert check(whole[start:stop], versions, versions, start) == ""


def test_every_file_cell_and_version_has_bytes_of_its_own() -> None:
    seen = {
        cell_bytes(file, cell, version, CELL)
        for file in range(1, 7)
        for cell in range(5)
        for version in (2, 4, 6)
    }
    assert len(seen) == 6 * 5 * 3


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (data(2, 2), "stale data (v1)"),
        (data(2, 6), "data that nobody has written (v3)"),
        (data(2, 5), "zeros where data is due"),
        (data(4, 2, file=8), "data of another file (8, cell 0, v2)"),
        (data(2) + data(4, first=5), "data of another place (cell 5, v2)"),
        (data(2) + data(4, first=1)[:500] + data(2, first=1)[500:], "torn data (begins as v2)"),
        (data(2) + b"x" * CELL, "bytes that say nothing of themselves"),
        (data(2) + data(4, first=1)[:-1] + b"!", "torn data (begins as v2)"),
    ],
)
def test_wrong_data_is_found_and_described(read: bytes, fault: str) -> None:
    assert check(read, [2, 4], [2, 4]) == fault


def test_data_from_before_a_truncation_is_stale() -> None:
    assert check(data(2), [5], [5]) == "stale data (v1)"
    assert check(data(5), [5], [5]) == ""


def test_during_a_write_only_old_data_new_data_and_a_mixture_are_legal() -> None:
    assert check(data(2), [2], [4]) == ""
    assert check(data(4), [2], [4]) == ""
    assert check(data(4)[:100] + data(2)[100:], [2], [4]) == ""
    assert check(data(6), [2], [4]) == "data that nobody has written (v3)"
    assert check(data(4, file=8), [2], [4]).startswith("data of another file")
    assert check(bytes(CELL), [2], [4]) == "zeros where data is due"
    assert check(bytes(CELL), [2], [5]) == ""


def test_versions_written_during_a_read_are_legal() -> None:
    for version in (2, 4, 5, 6, 8):
        assert check(data(version), [2], [8]) == ""
    assert check(data(10), [2], [8]) != ""


def test_the_length_follows_from_the_size() -> None:
    assert check_length(0, 100, 100, [100]) is None
    assert check_length(50, 100, 50, [100]) is None
    assert check_length(200, 100, 0, [100]) is None
    for got in (0, 99, 101):
        assert isinstance(check_length(0, 101, got, [100]), Violation)
    assert check_length(0, 101, 50, [20, 70]) is None
    assert isinstance(check_length(0, 101, 80, [20, 70]), Violation)


def test_the_size_is_exact_unless_it_changes() -> None:
    assert check_size(100, [100]) is None
    assert isinstance(check_size(99, [100]), Violation)
    assert check_size(60, [20, 70]) is None
    assert isinstance(check_size(80, [20, 70]), Violation)


@pytest.fixture
def model() -> Model:
    made = Model(SHAPE)
    slot = made.free_slot()
    assert slot is not None
    slot.reset(made.new_serial(), 17, 0)
    made.names[0].begin(slot.serial)
    made.names[0].done()
    made.names[0].lift(1)
    return made


def test_a_change_is_possible_when_it_begins_and_required_when_the_floor_rises(model: Model) -> None:
    slot = model.slots[0]
    slot.begin(1, 3, 2)
    assert (slot.floor.get(0, 4), slot.begun.get(0, 4)) == ([0, 0, 0, 0], [0, 2, 2, 0])
    slot.done(1, 3, 2)
    assert slot.latest.get(0, 4) == [0, 2, 2, 0]
    assert slot.floor.get(0, 4) == [0, 0, 0, 0]
    slot.lift(1, [2, 2], None)
    assert slot.floor.get(0, 4) == [0, 2, 2, 0]
    slot.lift(1, [0, 0], None)
    assert slot.floor.get(0, 4) == [0, 2, 2, 0], "it never decreases"
    assert slot.next_version(0, 3, zeros=False) == 4
    assert slot.next_version(0, 3, zeros=True) == 5


def test_a_series_knows_the_values_that_may_be_seen(model: Model) -> None:
    size = model.slots[0].size
    floor = size.floor
    size.begin(10)
    assert (size.legal(floor), size.latest) == ([0, 10], 0)
    number = size.done()
    assert (size.legal(size.floor), size.latest) == ([0, 10], 10)
    size.lift(number)
    assert size.legal(size.floor) == [10]
    for value in range(RING):
        size.begin(value)
        size.done()
    assert size.legal(floor) == [], "older than the history"


def test_a_slot_is_free_when_it_has_neither_a_name_nor_an_open_fd(model: Model) -> None:
    assert model.free_slot() is model.slots[1]
    name = model.names[0]
    for number in (1, 2):
        model.slots[number].reset(model.new_serial(), 17, 0)
        model.names[1].begin(model.slots[number].serial)
        model.names[1].lift(model.names[1].done())
    assert model.free_slot() is model.slots[1]
    model.slots[1].opens[0] += 1
    assert model.free_slot() is None
    name.begin(0)
    assert model.free_slot() is None, "the name may still lead to it"
    name.lift(name.done())
    assert model.free_slot() is model.slots[0]


def test_locks_of_two_openers_exclude_each_other(model: Model, tmp_path: Path) -> None:
    one, two = Locks(tmp_path / "locks", SHAPE), Locks(tmp_path / "locks", SHAPE)
    slot = model.slots[0]
    with one.cells(slot, 0, 4), two.cells(slot, 4, None), one.floor(slot), two.creation(shared=True):
        with one.creation(shared=True), one.names(0, 1, shared=True), two.names(1, shared=True):
            pass
        assert not two.would_wait(slot, 4, 6)
        assert two.would_wait(slot, 3, 5)
        assert one.would_wait(slot, 6, None)


def test_the_stalest_cell_of_a_read_counts() -> None:
    cells = [data(2), data(4), data(2)]
    assert staleness(cells, [2, 4, 2], [10, 10, 10], 50) == 0
    assert staleness(cells, [4, 6, 2], [10, 30, 49], 50) == 40
    assert staleness(cells, [2, 2, 2], [10, 10, 10], 50) == 0, "newer than the last complete write"
    assert staleness([bytes(CELL)], [2], [10], 50) == 0, "zeros name no version"
    assert staleness([data(2)], [4], [(1 << 32) - 5], 5) == 10, "the clock wraps"


def test_files_that_are_not_opened_again_have_slots_of_their_own() -> None:
    model = Model(Shape(slots=3, names=2, processes=2, cells=8, quiet=2))
    model.quiet[1].reset(model.new_serial(), CELL, 0)
    assert model.find(1) is model.quiet[1]
    assert model.free_slot() is model.slots[0]
    model.note_staleness(0, 7)
    model.note_staleness(1, 3)
    assert model.staleness == 7


def test_a_slot_remembers_the_sizes_from_before_the_source_changed(model: Model) -> None:
    slot = model.slots[0]
    for size in (10, 20):
        slot.size.begin(size)
        slot.size.lift(slot.size.done())
    assert slot.missed_sizes(slot.size.floor) == [], "the kernel set them"
    slot.size.begin(30)
    number = slot.size.done()
    slot.size_set_in_source(number)
    assert slot.missed_sizes(slot.size.floor) == [0, 10], "20 is still legal"
    slot.size.lift(number)
    assert slot.missed_sizes(slot.size.floor) == [0, 10, 20]
    slot.size.begin(37)
    assert slot.missed_sizes(slot.size.floor) == [0, 10, 20, 7, 17, 27], "7 are being appended"
    slot.size.lift(slot.size.done())
    assert slot.missed_sizes(slot.size.floor) == [0, 10, 20, 7, 17, 27]
    for size in range(RING):
        slot.size.begin(size)
        slot.size.lift(slot.size.done())
    assert slot.missed_sizes(slot.size.floor) == [], "forgotten by now"
    slot.reset(model.new_serial(), 17, 0)
    assert slot.missed_sizes(slot.size.floor) == []


def grown(tmp_path: Path, *, opens_handles: bool) -> tuple[Process, Handle]:
    """Return a process that has a file open which grew in the source from one cell to two."""
    plan = Plan(
        seed=1, seconds=1, source=tmp_path / "source", mount=tmp_path / "mnt", evidence=tmp_path,
        coherency="watch", processes=SHAPE.processes, cells=SHAPE.cells, page_size=4096, attr_timeout=1,
        least_pool=0, page_caches=(), opens_handles=opens_handles,
    )  # fmt: skip
    model = Model(SHAPE)
    slot = model.slots[0]
    slot.reset(model.new_serial(), CELL, 0)
    process = Process(plan, model, 0)
    process.change(slot, 0, 1, lambda _: None, size=CELL)
    process.change(slot, 1, 2, lambda _: None, size=2 * CELL, source=lambda *_: None)
    slot.lift(1, slot.latest.get(1, 2), slot.size.latest_number)
    return process, Handle(-1, os.O_RDONLY, [(slot, slot.serial)])


@pytest.mark.parametrize("opens_handles", [True, False])
def test_a_read_of_an_old_size_is_legal_without_the_privilege_if_the_next_is_whole(
    tmp_path: Path, opens_handles: bool
) -> None:
    process, handle = grown(tmp_path, opens_handles=opens_handles)
    whole = data(2, 2, file=handle.slots[0][1])
    replies = iter((whole[:CELL], whole))
    if opens_handles:
        with pytest.raises(IllegalError, match="wrong length"):
            process.read(handle, 0, 2 * CELL, "pread", lambda: next(replies))
    else:
        assert process.read(handle, 0, 2 * CELL, "pread", lambda: next(replies)) == 2 * CELL
        assert process.counts["reads of an old size made again"] == 1


@pytest.mark.parametrize(
    ("first", "again"),
    [(slice(0, CELL), slice(0, CELL)), (slice(0, CELL - 1), slice(0, 2 * CELL))],
    ids=["it stays short", "the file never ended there"],
)
def test_other_short_reads_are_illegal_without_the_privilege(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: slice, again: slice
) -> None:
    monkeypatch.setattr("scripts.check.soak.process.SLACK", 0.05)
    process, handle = grown(tmp_path, opens_handles=False)
    whole = data(2, 2, file=handle.slots[0][1])
    replies = chain([whole[first]], repeat(whole[again]))
    with pytest.raises(IllegalError, match="wrong length"):
        process.read(handle, 0, 2 * CELL, "pread", lambda: next(replies))


def test_stale_bytes_of_an_old_size_are_illegal_without_the_privilege(tmp_path: Path) -> None:
    process, handle = grown(tmp_path, opens_handles=False)
    replies = chain([bytes(CELL)], repeat(data(2, 2, file=handle.slots[0][1])))
    with pytest.raises(IllegalError, match="wrong length"):
        process.read(handle, 0, 2 * CELL, "pread", lambda: next(replies))
