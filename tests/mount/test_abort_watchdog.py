"""The guardian severs one connection and no other, whichever has that one's number by then."""

import os
import select
from pathlib import Path

import pytest

from cleanfs.linux.fusectl import Connection, connection_of
from cleanfs.mount.abort_watchdog import AbortWatchdog
from tests.harness.unserved import fuse_mount

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="this takes root")

ATTEMPTS = 50
"""Other mounts of this machine may get the number first."""


def is_severed(device: int) -> bool:
    poll = select.poll()
    poll.register(device, select.POLLIN)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def connection(device: int, path: Path) -> Connection:
    found = connection_of(device, str(path))
    assert found is not None
    return found


async def guard(watchdog: AbortWatchdog, told: Connection) -> None:
    """What a watchdog does for a daemon that ends in order."""
    watchdog.tell(told)
    await watchdog.ready()
    watchdog.close()


@pytest.fixture
def watchdog() -> AbortWatchdog:
    """Start it before the mount, as a daemon does: fusectl numbers inodes anew while nobody has it."""
    started = AbortWatchdog()
    started.start()
    return started


async def test_the_connection_that_it_was_told_of_is_severed(
    tmp_path: Path, watchdog: AbortWatchdog
) -> None:
    with fuse_mount(tmp_path) as device:
        await guard(watchdog, connection(device, tmp_path))
        assert is_severed(device)
        assert connection_of(device, str(tmp_path)) is None, "its number may be another's next"


async def test_a_connection_that_got_the_number_of_one_that_is_gone_is_left_alone(
    tmp_path: Path, watchdog: AbortWatchdog
) -> None:
    """The child gets to run late on a busy machine: another mount may have the number by then."""
    for _ in range(ATTEMPTS):
        with fuse_mount(tmp_path) as device:
            told = connection(device, tmp_path)
        with fuse_mount(tmp_path) as device:
            if connection(device, tmp_path).number == told.number:
                await guard(watchdog, told)
                assert not is_severed(device)
                return
    pytest.fail("other mounts of this machine took the number each time")
