"""Test the range of a mount's recent request ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleanfs.fuse import request_ids
from cleanfs.fuse.protocol import FUSE_REQ_ID_STEP
from cleanfs.fuse.request_ids import KEPT_SECONDS, MAX_RECENT, SAMPLE_SECONDS, UNREAD, RequestIds


@given(
    st.lists(st.tuples(st.floats(0, 0.3), st.integers(0, 3)), min_size=1, max_size=200),
    st.integers(1, 1 << 40),
)
def test_every_recent_request_is_in_the_range(requests: list[tuple[float, int]], first: int) -> None:
    """Each request comes some time after the last, and after some that cleanfs never read."""
    now, unique, made = 0.0, 2 * first, list[tuple[float, int]]()
    seen = RequestIds(lambda: now)
    for after, unread in requests:
        now += after
        unique += FUSE_REQ_ID_STEP * (1 + unread)
        made.append((now, unique))
        seen.messages += 1
        if now >= seen.due_at:
            seen.saw(unique)
    late = [unique for at, unique in made if now - at <= KEPT_SECONDS - SAMPLE_SECONDS]
    assert set(late) <= set(seen.recent())
    assert not any(number % 2 for number in seen.recent())
    assert seen.recent()[-1] <= unique + FUSE_REQ_ID_STEP * UNREAD


def test_the_range_is_bounded() -> None:
    now = 0.0
    seen = RequestIds(lambda: now)
    seen.messages = 1
    seen.saw(2)
    seen.messages += 10 * MAX_RECENT
    assert len(seen.recent()) == MAX_RECENT


def test_a_kernel_that_does_not_refuse_requests_has_no_range(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = RequestIds()
    assert not seen.recent()
    seen.saw(2)
    assert seen.recent()
    monkeypatch.setattr(request_ids, "kernel_version", lambda: (4, 19))
    assert not seen.recent()
