"""The native engine works with several threads, across a fork, and at the end of a process."""

import sys
import threading
import time

import pytest

from tests.backends.engines import check, make, sync
from tests.backends.native import Engine
from tests.backends.pages import FILLER_PAGES, KEY, MIB, PAGE_SIZE, UUID_A, UUID_B, halves
from tests.backends.programs import run


@pytest.fixture(params=["log", "zbud"])
def engine(request: pytest.FixtureRequest) -> str:
    """Return the native engine's name, with either allocator."""
    name: str = request.param
    return name


def test_two_threads_can_use_one_engine_at_once(engine: str) -> None:
    z = make(engine, 24 * MIB)
    pools = [z.init_fs(PAGE_SIZE), z.init_shared_fs(UUID_B, PAGE_SIZE)]
    large = [z.init_fs(MIB), z.init_shared_fs(UUID_A, MIB)]
    pages = [FILLER_PAGES[i] * 256 for i in range(4)]
    over = time.monotonic() + 1.5
    errors: list[BaseException] = []
    turns = [0, 0]

    def hammer(number: int) -> None:
        buffer = bytearray(16 * MIB)
        turn = 0
        try:
            while time.monotonic() < over or turn <= 20:
                turn += 1
                at = turn * (7 + number) % 40
                for pool in large:  # large enough for the GIL to be released
                    z.put_page(pool, KEY, at, pages[at % 4])
                    hits = z.get_pages_into(pool, KEY, at - at % 16, buffer)
                    for place, hit in enumerate(hits):
                        if hit:
                            page = pages[(at - at % 16 + place) % 4]
                            assert buffer[place * MIB : (place + 1) * MIB] == page
                for pool in pools:
                    z.put_pages(pool, KEY, list(enumerate(FILLER_PAGES[:100], at * 100)))
                    for place, page in enumerate(z.get_pages(pool, KEY, at * 100 + 20, 50), 20):
                        assert page is None or page == FILLER_PAGES[place]
                z.flush_pages(large[turn % 2], KEY, at, at + 5)
                z.flush_page(pools[turn % 2], KEY, at * 100)
                if turn % 10 == number:
                    z.resize((16 + turn % 16) * MIB)
                    sync(z)
                    check(z)
        except BaseException as exc:
            errors.append(exc)
        turns[number] = turn

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=hammer, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert min(turns) > 20, "both threads must make progress"
    sync(z)
    check(z)


def test_an_engine_can_be_deleted_while_its_worker_runs() -> None:
    for _ in range(20):
        z = Engine(16 * MIB, method="lz4hc", level=9)
        pool = z.init_fs(PAGE_SIZE)
        z.put_pages(pool, KEY, halves(range(100)))
        on_loan = z.get_pages(pool, KEY, 0, 50)
        del z
        assert {sys.getrefcount(page) for page in on_loan} == {3}


def test_a_process_can_end_while_it_has_an_engine() -> None:
    run(
        """
        from cleanfs.backends._zcache import Engine
        from tests.backends.pages import KEY
        from tests.backends.pages import FILLER_PAGES

        z = Engine(16 << 20, method="lz4hc", level=12)
        pool = z.init_fs(4096)
        z.put_pages(pool, KEY, list(enumerate(FILLER_PAGES)))
        on_loan = z.get_pages(pool, KEY, 0, 50)
        """
    )


def test_an_engine_that_was_made_before_a_fork_works_in_the_child() -> None:
    printed = run(
        """
        import os
        from cleanfs.backends._zcache import Engine
        from tests.backends.pages import KEY, text

        z = Engine(16 << 20)
        pool = z.init_fs(4096)
        if child := os.fork():
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        z.put_page(pool, KEY, 0, text("x"))
        z.sync()
        assert z.get_page(pool, KEY, 0) == text("x")
        print("works")
        """
    )
    assert printed == "works\n"
