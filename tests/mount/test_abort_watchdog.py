"""Test that the watchdog aborts its own connection and no later one with the same number."""

import os
import select
from pathlib import Path

import pytest

from cleanfs.linux.fusectl import Connection, connection_of
from cleanfs.mount.abort_watchdog import AbortWatchdog
from tests.harness.unserved import fuse_mount

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="this takes root")

ATTEMPTS = 50
"""How often to try to get a connection number that other mounts on this machine may take."""


def is_aborted(device: int) -> bool:
    poll = select.poll()
    poll.register(device, select.POLLIN)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def connection(device: int, path: Path) -> Connection:
    found = connection_of(device, str(path))
    assert found is not None
    return found


async def run_watchdog(watchdog: AbortWatchdog, watched: Connection) -> None:
    """Use a watchdog as a daemon does that ends normally."""
    watchdog.set_connection(watched)
    await watchdog.ready()
    watchdog.close()


@pytest.fixture
def watchdog() -> AbortWatchdog:
    """Start it before the mount, as a daemon does: unmounted, fusectl numbers its inodes anew."""
    started = AbortWatchdog()
    started.start()
    return started


async def test_the_watched_connection_is_aborted(tmp_path: Path, watchdog: AbortWatchdog) -> None:
    with fuse_mount(tmp_path) as device:
        await run_watchdog(watchdog, connection(device, tmp_path))
        assert is_aborted(device)
        assert connection_of(device, str(tmp_path)) is None, "its number may be reused"


async def test_a_later_connection_with_the_same_number_is_left_alone(
    tmp_path: Path, watchdog: AbortWatchdog
) -> None:
    """On a busy machine the child runs late: another mount may have the number by then."""
    for _ in range(ATTEMPTS):
        with fuse_mount(tmp_path) as device:
            watched = connection(device, tmp_path)
        with fuse_mount(tmp_path) as device:
            if connection(device, tmp_path).number == watched.number:
                await run_watchdog(watchdog, watched)
                assert not is_aborted(device)
                return
    pytest.fail("other mounts on this machine took the number each time")
