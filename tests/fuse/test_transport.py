"""Test which transport is chosen, and why."""

import errno
from pathlib import Path

import pytest

from cleanfs.fuse import transport
from cleanfs.fuse.transport import Transport, choose, obstacle, why_no_ring


@pytest.fixture
def parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a file in place of the kernel's parameter."""
    path = tmp_path / "enable_uring"
    monkeypatch.setattr(transport, "PARAMETER", str(path))
    return path


def test_queues_are_used_where_they_are_asked_for(parameter: Path) -> None:
    parameter.write_text("Y\n")
    assert obstacle() is None
    assert choose(Transport.AUTO).transport is Transport.DEVICE
    assert choose(Transport.URING).transport is Transport.URING
    assert choose(Transport.DEVICE).transport is Transport.DEVICE


def test_the_obstacle_says_what_to_do(parameter: Path) -> None:
    parameter.write_text("N\n")
    why = obstacle()
    assert why is not None
    assert f"echo Y > {parameter}" in why
    chosen = choose(Transport.URING)
    assert (chosen.transport, chosen.reason) == (Transport.DEVICE, why)


def test_an_old_kernel_is_named(parameter: Path) -> None:
    assert "Linux 6.14" in (obstacle() or "")


def test_a_ring_that_is_not_permitted_has_a_remedy() -> None:
    assert "io_uring_disabled" in why_no_ring(OSError(errno.EPERM, "not permitted"))
    assert why_no_ring(OSError(errno.ENOMEM, "no memory")) == "io_uring: no memory"
