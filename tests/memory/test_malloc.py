"""Giving memory back, with figures of ours, and with malloc's."""

import os
import subprocess
import sys

import trio
from trio.testing import MockClock

from cleanfs.memory.malloc import TRIM_BYTES, TRIM_SECONDS, give_back


async def test_what_became_free_is_given_back_once(autojump_clock: MockClock) -> None:
    free = 0
    trims: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_back, lambda: free, lambda: trims.append(free))
        await trio.sleep(TRIM_SECONDS * 1.5)
        assert trims == []
        free = 3 * TRIM_BYTES  # requests were answered
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


def test_buffers_of_many_requests_do_not_stay() -> None:
    """In a process of its own: between them lie other things that do."""
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
        "        await malloc.give_back(trim=lambda: (syscalls.trim_malloc(), limit.cancel()))\n"
        "trio.run(main)\n"
        "print(most - malloc.rss_bytes() >> 20)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=True, env=os.environ
    )
    assert 60 <= int(done.stdout) <= 68
