"""Test trimming, with simulated figures and with malloc's own."""

import os
import subprocess
import sys

import trio
from trio.testing import MockClock

from cleanfs.memory.malloc import TRIM_BYTES, TRIM_SECONDS, trim_periodically


async def test_freed_memory_is_trimmed_once(autojump_clock: MockClock) -> None:
    free = 0
    trims: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trim_periodically, lambda: free, lambda: trims.append(free))
        await trio.sleep(TRIM_SECONDS * 1.5)
        assert trims == []
        free = 3 * TRIM_BYTES  # requests have finished
        await trio.sleep(3 * TRIM_SECONDS)
        assert trims == [3 * TRIM_BYTES]
        free = 4 * TRIM_BYTES - 1
        await trio.sleep(3 * TRIM_SECONDS)
        assert len(trims) == 1
        free = TRIM_BYTES  # used again
        await trio.sleep(TRIM_SECONDS)
        free = 2 * TRIM_BYTES
        await trio.sleep(TRIM_SECONDS)
        assert trims == [3 * TRIM_BYTES, 2 * TRIM_BYTES]
        nursery.cancel_scope.cancel()


def test_buffers_of_many_requests_are_returned() -> None:
    """The buffers lie between allocations that stay, in a process of its own."""
    script = (
        "import trio\n"
        "from cleanfs.memory import malloc; from cleanfs.linux import syscalls\n"
        "syscalls.tune_malloc()\n"
        "malloc.TRIM_SECONDS = 0.01\n"
        "buffers, others = [], []\n"
        "for i in range(64):\n"
        "    buffers.append(bytearray(b'x') * (1 << 20))\n"
        "    others.append(bytes(50000))\n"
        "buffers.clear()\n"
        "most = malloc.rss_bytes()\n"
        "async def main():\n"
        "    with trio.move_on_after(20) as limit:\n"
        "        await malloc.trim_periodically(\n"
        "            trim=lambda: (syscalls.trim_malloc(), limit.cancel()))\n"
        "trio.run(main)\n"
        "print(most - malloc.rss_bytes() >> 20)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=True, env=os.environ
    )
    assert 60 <= int(done.stdout) <= 68
