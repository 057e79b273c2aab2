"""A device for the tests of what reads it."""

from collections.abc import Iterator

import pytest

from tests.harness.kernel import Device


@pytest.fixture
def device() -> Iterator[Device]:
    """Make a pair of sockets in place of the FUSE device."""
    device = Device()
    yield device
    device.close()
