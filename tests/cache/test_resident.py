"""Test the resident pages: both engines through one suite, and step by step against each other."""

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cleanfs.backends.engines import native_module
from cleanfs.cache.resident import PythonResident, Resident, make_resident

PAGE = 4096
ENGINES: dict[str, Callable[[int], Resident]] = {"python": PythonResident}
if native := native_module("cleanfs.cache._pagecache"):
    ENGINES["native"] = native.NativeResident


def page(number: int) -> bytes:
    """Make a page in which each byte differs from its neighbours."""
    return number.to_bytes(8, "little") + bytes(i % 251 for i in range(PAGE - 8))


@pytest.fixture(params=ENGINES)
def resident(request: pytest.FixtureRequest) -> Resident:
    return ENGINES[request.param](PAGE)


def evicted(resident: Resident, count: int) -> list[tuple[int, int]]:
    """Return the files and indices of victims."""
    return [(file, index) for file, pages in resident.evict(count) for index, _ in pages]


def test_pages_are_returned_unchanged(resident: Resident) -> None:
    resident.insert(7, 5, [page(0), None, page(2)])
    assert resident.look_up(7, 4, 5, 0, 5 * PAGE) == [None, page(0), None, page(2), None]
    assert resident.indices(7) == [5, 7]
    assert len(resident) == 2


def test_an_unknown_file_has_no_pages(resident: Resident) -> None:
    resident.insert(7, 5, [page(0)])
    assert resident.look_up(8, 5, 2, 0, 2 * PAGE) == [None, None]
    assert resident.indices(8) == []
    resident.discard(8, 0, None)
    assert len(resident) == 1


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 3 * PAGE), (1, 3 * PAGE - 1), (PAGE, PAGE + 1), (4095, 8193), (77, 77)]
)
def test_a_resident_range_is_cut_to_the_bytes_requested(
    resident: Resident, start: int, stop: int
) -> None:
    pages = [page(i) for i in range(3)]
    resident.insert(1, 10, pages)
    assert resident.look_up(1, 10, 3, start, stop) == b"".join(pages)[start:stop]


def test_one_whole_page_is_returned_without_a_copy(resident: Resident) -> None:
    one = page(1)
    resident.insert(1, 10, [one])
    if not isinstance(resident, PythonResident):
        assert resident.look_up(1, 10, 1, 0, PAGE) is one
    assert resident.look_up(1, 10, 1, 1, PAGE) == one[1:]


def test_a_resident_page_is_not_replaced(resident: Resident) -> None:
    resident.insert(1, 0, [page(0)])
    resident.insert(1, 0, [page(1), page(2)])
    assert resident.look_up(1, 0, 2, 0, 2 * PAGE) == page(0) + page(2)
    assert len(resident) == 2


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_data_is_cut_into_pages(
    resident: Resident, size: int, kind: Callable[[bytes], bytes | bytearray | memoryview]
) -> None:
    data = Random(size).randbytes(size)
    resident.insert_data(3, 9, kind(data))
    pages = -(-size // PAGE)
    assert resident.indices(3) == list(range(9, 9 + pages))
    if pages:
        padded = data.ljust(pages * PAGE, b"\0")
        assert resident.look_up(3, 9, pages, 0, pages * PAGE) == padded


def test_victims_are_returned_with_their_pages_in_runs_per_file(resident: Resident) -> None:
    resident.insert(1, 0, [page(10), page(11)])
    resident.insert(2, 5, [page(25)])
    resident.insert(1, 7, [page(17)])
    assert resident.evict(9) == [
        (1, [(0, page(10)), (1, page(11))]),
        (2, [(5, page(25))]),
        (1, [(7, page(17))]),
    ]
    assert len(resident) == 0
    assert resident.evict(1) == []


def test_a_referenced_page_survives_one_round(resident: Resident) -> None:
    resident.insert(1, 0, [page(i) for i in range(4)])
    resident.look_up(1, 0, 1, 0, PAGE)
    assert evicted(resident, 1) == [(1, 1)]
    assert resident.activations == 1


def test_a_lookup_with_gaps_references_the_pages_it_finds(resident: Resident) -> None:
    resident.insert(1, 0, [page(i) for i in range(4)])
    resident.look_up(1, 3, 2, 0, 2 * PAGE)
    assert evicted(resident, 3) == [(1, 0), (1, 1), (1, 2)]


def test_a_page_that_returns_soon_is_a_refault(resident: Resident) -> None:
    resident.insert(1, 0, [page(i) for i in range(4)])
    assert evicted(resident, 1) == [(1, 0)]
    resident.insert(1, 0, [page(0)])
    assert resident.refaults == 1
    resident.insert(1, 9, [page(9)])
    assert evicted(resident, 4) == [(1, 1), (1, 2), (1, 3), (1, 9)]


@pytest.mark.parametrize(("first", "stop"), [(0, None), (2, None), (1, 3), (3, 3), (0, 1 << 50)])
def test_a_range_is_discarded(resident: Resident, first: int, stop: int | None) -> None:
    resident.insert(1, 0, [page(i) for i in range(4)])
    resident.insert(2, 0, [page(9)])
    resident.discard(1, first, stop)
    left = [i for i in range(4) if i < first or (stop is not None and i >= stop)]
    assert resident.indices(1) == left
    assert resident.indices(2) == [0]
    assert evicted(resident, 9) == [*((1, i) for i in left), (2, 0)]


def test_the_history_of_a_page_outlives_its_contents(resident: Resident) -> None:
    resident.insert(1, 0, [page(0), page(1)])
    assert evicted(resident, 1) == [(1, 0)]
    resident.discard(1, 0, None)
    resident.insert(1, 0, [page(7)])
    assert resident.refaults == 1
    assert resident.look_up(1, 0, 1, 0, PAGE) == page(7)


def test_large_indices_work(resident: Resident) -> None:
    last = (1 << 51) - 1
    resident.insert(1, last, [page(1)])
    assert resident.indices(1) == [last]
    resident.discard(1, last, None)
    assert len(resident) == 0


@pytest.mark.skipif("native" not in ENGINES, reason="the Python engine trusts its caller")
@pytest.mark.parametrize("wrong", [b"", b"x", bytes(PAGE + 1), bytearray(PAGE), 7])
def test_wrong_arguments_are_refused(wrong: bytes) -> None:
    resident = ENGINES["native"](PAGE)
    with pytest.raises(ValueError, match="not a page"):
        resident.insert(1, 0, [page(0), wrong])
    with pytest.raises(ValueError, match="not a range"):
        resident.look_up(1, 0, 1, 0, PAGE + 1)


def test_the_requested_engine_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLEANFS_PUREPYTHON", "1")
    assert isinstance(make_resident(PAGE), PythonResident)


FILES = st.integers(1, 3)
INDICES = st.one_of(st.integers(0, 12), st.integers(60, 70), st.just(1 << 40))


class Twins(RuleBasedStateMachine):
    """Checks that both engines do the same in any sequence of steps."""

    @initialize()
    def start(self) -> None:
        self.python = PythonResident(PAGE)
        self.native = ENGINES["native"](PAGE)
        self.number = 0

    def new_page(self) -> bytes:
        self.number += 1
        return page(self.number)

    @rule(file=FILES, first=INDICES, there=st.lists(st.booleans(), max_size=6))
    def insert(self, file: int, first: int, there: list[bool]) -> None:
        pages = [self.new_page() if yes else None for yes in there]
        self.python.insert(file, first, pages)
        self.native.insert(file, first, pages)

    @rule(file=FILES, first=INDICES, size=st.integers(0, 3 * PAGE))
    def insert_data(self, file: int, first: int, size: int) -> None:
        data = (self.new_page() * 3)[:size]
        self.python.insert_data(file, first, data)
        self.native.insert_data(file, first, data)

    @rule(file=FILES, first=INDICES, count=st.integers(1, 6), data=st.data())
    def look_up(self, file: int, first: int, count: int, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, count * PAGE))
        stop = data.draw(st.integers(start, count * PAGE))
        found = self.python.look_up(file, first, count, start, stop)
        assert self.native.look_up(file, first, count, start, stop) == found

    @rule(count=st.integers(0, 8))
    def evict(self, count: int) -> None:
        assert self.native.evict(count) == self.python.evict(count)

    @rule(file=FILES, first=INDICES, length=st.none() | st.integers(0, 70))
    def discard(self, file: int, first: int, length: int | None) -> None:
        stop = None if length is None else first + length
        self.python.discard(file, first, stop)
        self.native.discard(file, first, stop)

    @invariant()
    @precondition(lambda self: hasattr(self, "native"))
    def same(self) -> None:
        self.native.check()  # type: ignore[attr-defined]  # only the native engine has it
        assert len(self.native) == len(self.python)
        assert (self.native.refaults, self.native.activations) == (
            self.python.refaults,
            self.python.activations,
        )
        for file in (1, 2, 3):
            assert self.native.indices(file) == self.python.indices(file)


if "native" in ENGINES:
    TestTwins = Twins.TestCase
    TestTwins.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
