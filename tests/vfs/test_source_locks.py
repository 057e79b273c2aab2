"""Test what is remembered of locks in the source."""

import fcntl

import pytest

from cleanfs.vfs.source_locks import OFFSET_MAX, Lock, after

READ, WRITE, UNLOCK = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK


@pytest.mark.parametrize(
    ("held", "new", "left"),
    [
        ([], (WRITE, 5, 9), [(WRITE, 5, 9)]),
        ([(WRITE, 0, 9)], (UNLOCK, 3, 5), [(WRITE, 0, 2), (WRITE, 6, 9)]),
        ([(WRITE, 0, 9)], (READ, 5, OFFSET_MAX), [(WRITE, 0, 4), (READ, 5, OFFSET_MAX)]),
        ([(WRITE, 0, 4), (READ, 5, 9)], (UNLOCK, 0, OFFSET_MAX), []),
        ([(READ, 0, 4), (READ, 8, 9)], (WRITE, 4, 8), [(READ, 0, 3), (READ, 9, 9), (WRITE, 4, 8)]),
        ([(READ, 0, 4)], (UNLOCK, 5, 9), [(READ, 0, 4)]),
    ],
)
def test_what_an_owner_holds_after_a_change(
    held: list[tuple[int, int, int]], new: tuple[int, int, int], left: list[tuple[int, int, int]]
) -> None:
    found = after([Lock(*lock) for lock in held], Lock(*new))
    assert found == [Lock(*lock) for lock in left]
