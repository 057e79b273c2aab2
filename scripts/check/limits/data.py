"""Memory stays within its promise, and does not grow, while 50 GB of mixed data are read.

The 50 GB are a set of 2 GB, text, noise and zeros in files of 3 kB to 90 MB, read again and again by
four processes, each in an order of its own. The kernel drops at once what was read, so that every read
comes to the daemon. Every file is held against its checksum each time.
"""

import random
from pathlib import Path

from .content import make_set, read_and_drop
from .lab import MIB, Daemon, Lab, growth, in_processes, promised_mib

READERS = 4
GROWTH_MIB = 24.0


def run(lab: Lab) -> None:
    """See the module."""
    python = lab.engine == "python"
    source = lab.directory("source")
    total = lab.pick(2000, 300) * 10**6
    made = make_set(source, total)
    rounds = lab.pick(6 if python else 30, 2)
    with lab.mount(source, "--pool-limit", "512M", "--page-cache", "64M") as fs:
        daemon = Daemon(fs)
        lab.at_most("PSS when idle", daemon.sample().pss, 35 + (5 if python else 0), "MiB")
        with daemon.watched() as samples:

            def read(number: int) -> None:
                _read(fs.path, made, number, max(rounds // READERS, 1))

            for failure in in_processes(READERS, read, lab.seconds):
                lab.hold("every file as it is in the source", failure, "no difference", False)
        stats = fs.stats()
        lab.inform("read through the mount", f"{stats['read_bytes'] / 1e9:.1f} GB")
        lab.inform("of which from the source", f"{stats['source_read_bytes'] / 1e9:.1f} GB")
        most = promised_mib(stats, stats["inodes"], stats["pagecache_files"], busy=False)
        lab.at_most("PSS, the most", max(sample.pss for sample in samples), most, "MiB")
        lab.at_most(
            "its growth, second to last quarter of the time", growth(samples), GROWTH_MIB, "MiB"
        )
        used = stats["backend_counters"]["pool_used"] / MIB
        lab.at_most("the pool's own account", used, 512, "MiB")
        lab.same("backend errors", stats["backend_errors"], 0)


def _read(top: Path, made: dict[Path, tuple[int, int]], number: int, rounds: int) -> None:
    order = list(made.items())
    choose = random.Random(number)
    for _ in range(rounds):
        choose.shuffle(order)
        for name, (size, crc) in order:
            read_and_drop(top / name, size, crc)
