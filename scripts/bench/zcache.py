"""Measure what a page costs in zcache: nanoseconds to put and get, and bytes of RAM, on real data.

Each contestant is measured in a process of its own, in each round, one after the other; medians of the
rounds are shown. All pages are 4 KiB; the last page of a file is filled up with zeros.

* density: bytes of files over the growth of the process's memory
* metadata: bytes a page beside the compressed data (index and entry headers)
* core: times without Python, from a C++ program over the same engine, beside LZ4 itself
* zram: the kernel's compressed block device, read and written with O_DIRECT, 128 KiB a call
"""

import gc
import json
import os
import platform
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from random import Random
from typing import Any

import click
import lz4.block
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cleanfs.backends import zcache
from cleanfs.backends.ops import FileKey
from cleanfs.backends.options import BackendOptions
from cleanfs.backends.reference import ReferenceZcache
from scripts.lib.checkout import CHECKOUT

console = Console(width=120)

PAGE = 4096
RANGE = 32
"""Pages in one FUSE read."""

KEY = FileKey(64, 1000, b"generation")
LIMIT = 1 << 30

CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "log lz4": ("native", {"compression": "lz4"}),
    "log lz4, checksum": ("native", {"compression": "lz4", "checksum": True}),
    "log zstd:3": ("native", {"compression": "zstd:3"}),
    "log zstd:3+dict": ("native", {"compression": "zstd:3+dict"}),
    "log none": ("native", {"compression": "none"}),
    "zbud lz4": ("native", {"compression": "lz4", "allocator": "zbud"}),
    "Python engine lz4": ("reference", {"compression": "lz4"}),
    "dict of lz4.block": ("dict", {}),
}

CORE = {
    "log lz4": ("lz4", 1, 0, "log", 0),
    "log lz4, checksum": ("lz4", 1, 0, "log", 1),
    "log zstd:3": ("zstd", 3, 0, "log", 0),
    "log zstd:3+dict": ("zstd", 3, 1, "log", 0),
    "log none": ("none", 1, 0, "log", 0),
    "zbud lz4": ("lz4", 1, 0, "zbud", 0),
}

CURVE = (10_000, 100_000, 1_000_000, 10_000_000)


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--megabytes", type=click.IntRange(8), default=256, show_default=True, help="Of each corpus."
)
@click.option("--corpus", "only", multiple=True, help="Only these (default: all).")
@click.option("--python-source", "python", multiple=True, help="More directories with Python source.")
@click.option("--curve/--no-curve", default=True, help="Hold up to 10 million pages.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write all values here.")
def main(
    rounds: int,
    megabytes: int,
    only: tuple[str, ...],
    python: tuple[str, ...],
    curve: bool,
    json_file: str | None,
) -> None:
    """Measure every engine, allocator and compression of zcache."""
    PYTHON.extend(python)
    report: dict[str, Any] = {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "megabytes": megabytes,
        "corpora": {},
    }
    with tempfile.TemporaryDirectory(prefix="cleanfs-bench-", dir="/var/tmp") as name:
        scratch = Path(name)
        core = build_core(scratch)
        for corpus, write in CORPORA.items():
            if only and corpus not in only:
                continue
            path = scratch / "corpus"
            file_bytes = write(path, megabytes << 20)
            if file_bytes < 1 << 20:
                console.print(f"{corpus}: less than 1 MB of it on this machine: skipped")
                continue
            rows = measure(corpus, path, file_bytes, rounds, core)
            report["corpora"][corpus] = {"file_bytes": file_bytes, "contestants": rows}
            show(corpus, file_bytes, rows)
        if curve:
            report["curve"] = measure_curve(core)
    if json_file:
        Path(json_file).write_text(json.dumps(report, indent=2) + "\n")


def measure(
    corpus: str, path: Path, file_bytes: int, rounds: int, core: Path
) -> dict[str, dict[str, float]]:
    """Return medians by contestant and figure."""
    values: dict[str, dict[str, list[float]]] = {}

    def record(who: str, figures: dict[str, float]) -> None:
        for figure, value in figures.items():
            values.setdefault(who, {}).setdefault(figure, []).append(value)

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(corpus, total=rounds * (len(CONTESTANTS) + len(CORE) + 1))
        for _ in range(rounds):
            for who in CONTESTANTS:
                one_alone = [sys.executable, "-m", "scripts.bench.zcache", "--one", who]
                done = subprocess.run(
                    [*one_alone, str(path), str(file_bytes)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                record(who, json.loads(done.stdout))
                progress.advance(task)
            for who, (method, level, dictionary, allocator, checksum) in CORE.items():
                arguments = (method, level, dictionary, allocator, LIMIT, checksum)
                done = subprocess.run(
                    [core, "pages", path, *map(str, arguments)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                figures = json.loads(done.stdout)
                record(who, {f"core_{name}": figures[name] for name in ("put", "worker", "get")})
                bare = {
                    "core_worker": figures["bare_lz4_compress"],
                    "core_get": figures["bare_lz4_decompress"],
                }
                record("LZ4 itself", bare)
                progress.advance(task)
            if zram := measure_zram(path, file_bytes):
                record("zram lz4", zram)
            progress.advance(task)
    return {
        who: {figure: statistics.median(each) for figure, each in figures.items()}
        for who, figures in values.items()
    }


def show(corpus: str, file_bytes: int, rows: dict[str, dict[str, float]]) -> None:
    """Show one corpus as a table."""
    table = Table(title=f"{corpus}, {file_bytes / 1e6:,.0f} MB; ns a page")
    headings = {
        "put": "put, caller", "get": "get, put back", "get_into": "get, buffer", "core_put": "core put",
        "core_worker": "core worker", "core_get": "core get", "density": "density",
        "metadata": "metadata B",
    }  # fmt: skip
    table.add_column("contestant")
    for heading in headings.values():
        table.add_column(heading, justify="right")
    for who, figures in rows.items():
        cells = [figures.get(name) for name in headings]
        texts = [
            "" if cell is None else f"{cell:,.2f}" if cell < 100 else f"{cell:,.0f}" for cell in cells
        ]
        table.add_row(who, *texts)
    console.print(table)


# -- one contestant, in a process of its own -----------------------------------------------------


def one(who: str, path: Path, file_bytes: int) -> dict[str, float]:
    """Put the whole corpus, look at the memory, get it all back."""
    kind, options = CONTESTANTS[who]
    if kind == "dict":
        return one_dict(path, file_bytes)
    made = BackendOptions(LIMIT, **options)
    before = memory_bytes()
    backend = ReferenceZcache(made) if kind == "reference" else zcache.make(made)
    pool = backend.init_fs(PAGE)
    sync: Callable[[], None] = getattr(backend, "sync", lambda: None)
    # Fewer pages at a time than wake the worker, so that the caller's side is measured alone.
    batch = 32
    elapsed = 0.0
    count = 0
    for first, pages in batches(path, batch):
        puts = list(zip(range(first, first + len(pages)), pages, strict=True))
        start = time.perf_counter()
        for at in range(0, len(puts), RANGE):
            backend.put_pages(pool, KEY, puts[at : at + RANGE])
        elapsed += time.perf_counter() - start
        count += len(pages)
        sync()
        del puts, pages
    figures = {"put": elapsed / count * 1e9}
    gc.collect()
    counters = backend.counters()
    held = counters["eph_zpages"] / count
    if held > 0.5:
        figures["density"] = file_bytes * held / (memory_bytes() - before)
        figures["held"] = held
    if "metadata_bytes" in counters:
        headers = 12 if "log_bytes" in counters else 64 / 2
        figures["metadata"] = counters["metadata_bytes"] / counters["eph_zpages"] + headers
    half = count // 2 // RANGE * RANGE

    def get_and_put_back(at: int) -> None:
        pages = backend.get_pages(pool, KEY, at, RANGE)
        backend.put_pages(
            pool, KEY, [(at + i, page) for i, page in enumerate(pages) if page is not None]
        )

    figures["get"] = timed_gets(get_and_put_back, 0, half)
    into = getattr(backend, "get_pages_into", None)
    if into is not None:
        buffer = bytearray(RANGE * PAGE)
        figures["get_into"] = timed_gets(lambda at: into(pool, KEY, at, buffer), half, 2 * half)
    return figures


def one_dict(path: Path, file_bytes: int) -> dict[str, float]:
    """Measure what a page cache of twenty lines would do."""
    kept: dict[tuple[FileKey, int], bytes] = {}
    before = memory_bytes()
    elapsed = 0.0
    for first, pages in batches(path, 64):
        start = time.perf_counter()
        for index, page in enumerate(pages, first):
            kept[KEY, index] = lz4.block.compress(page, store_size=False)
        elapsed += time.perf_counter() - start
    figures = {"put": elapsed / len(kept) * 1e9, "density": file_bytes / (memory_bytes() - before)}

    def get(at: int) -> None:
        for index in range(at, at + RANGE):
            lz4.block.decompress(kept[KEY, index], uncompressed_size=PAGE)

    figures["get"] = timed_gets(get, 0, len(kept) // RANGE * RANGE)
    return figures


def timed_gets(get: Callable[[int], object], first: int, stop: int) -> float:
    """Return the nanoseconds a page."""
    start = time.perf_counter()
    for at in range(first, stop, RANGE):
        get(at)
    return (time.perf_counter() - start) / (stop - first) * 1e9


def batches(path: Path, count: int) -> Iterator[tuple[int, list[bytes]]]:
    """Cut the corpus: some pages at a time, with the index of the first."""
    with path.open("rb") as file:
        first = 0
        while data := file.read(count * PAGE):
            pages = [data[at : at + PAGE] for at in range(0, len(data), PAGE)]
            yield first, pages
            first += len(pages)


def memory_bytes() -> int:
    """Return how much anonymous memory of this process is in RAM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("the kernel does not say RssAnon")


# -- the core, and zram --------------------------------------------------------------------------


def build_core(scratch: Path) -> Path:
    """Build the C++ benchmark."""
    build = scratch / "build"
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DZCACHE_BENCH=ON"]
    for command in (
        ["cmake", "-S", str(CHECKOUT / "backends/native"), "-B", str(build), *options],
        ["cmake", "--build", str(build), "--target", "bench", "-j2"],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return build / "bench"


def measure_zram(path: Path, file_bytes: int) -> dict[str, float]:
    """Measure a zram device with the corpus on it; empty where the machine does not let us."""
    try:
        number = int(Path("/sys/class/zram-control/hot_add").read_text())
    except OSError:
        return {}
    device, sys_dir = Path(f"/dev/zram{number}"), Path(f"/sys/block/zram{number}")
    try:
        (sys_dir / "comp_algorithm").write_text("lz4")
        size = path.stat().st_size
        (sys_dir / "disksize").write_text(str(size))
        if not device.exists():
            major, minor = map(int, (sys_dir / "dev").read_text().split(":"))
            os.mknod(device, 0o600 | 0o060000, os.makedev(major, minor))
        pages = size // PAGE
        with path.open("rb") as file, mmap(-1, RANGE * PAGE) as buffer:
            fd = os.open(device, os.O_RDWR | os.O_DIRECT)
            try:
                elapsed = 0.0
                for offset in range(0, size, RANGE * PAGE):
                    count = file.readinto(buffer)
                    start = time.perf_counter()
                    os.pwritev(fd, [memoryview(buffer)[:count]], offset)
                    elapsed += time.perf_counter() - start
                used = int((sys_dir / "mm_stat").read_text().split()[2])
                start = time.perf_counter()
                for offset in range(0, size, RANGE * PAGE):
                    os.preadv(fd, [buffer], offset)
                read = time.perf_counter() - start
            finally:
                os.close(fd)
        return {
            "put": elapsed / pages * 1e9,
            "get_into": read / pages * 1e9,
            "density": file_bytes / used,
        }
    except OSError as exc:
        console.print(f"zram: {exc}: skipped")
        return {}
    finally:
        (sys_dir / "reset").write_text("1")
        Path("/sys/class/zram-control/hot_remove").write_text(str(number))


def measure_curve(core: Path) -> dict[str, Any]:
    """Measure what one operation costs with more and more pages held."""
    table = Table(title="pages held, and ns an operation on one of them at random")
    for heading in ("allocator", "pages", "get", "flush_page", "flush_inode, a page", "index B a page"):
        table.add_column(heading, justify="right")
    curves = {}
    for allocator in ("log", "zbud"):
        done = subprocess.run(
            [core, "curve", allocator, *map(str, CURVE)], check=True, capture_output=True, text=True
        )
        curves[allocator] = json.loads(done.stdout)
        for point in curves[allocator]:
            table.add_row(
                allocator, f"{point['pages']:,}", f"{point['get']:.0f}", f"{point['flush_page']:.0f}",
                f"{point['flush_inode_per_page']:.0f}", f"{point['metadata']:.1f}",
            )  # fmt: skip
    console.print(table)
    return curves


# -- data ----------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """Holds a file of whole pages, and how many bytes of it are files' own."""

    path: Path
    size: int
    file_bytes: int = 0
    written: int = 0

    def add(self, data: bytes) -> bool:
        """Append a file, as far as there is room; False if that was the last of it."""
        data = data[: self.size - self.written]
        with self.path.open("ab") as out:
            out.write(data + bytes(-len(data) % PAGE))
        self.file_bytes += len(data)
        self.written += -(-len(data) // PAGE) * PAGE
        return self.written < self.size


def files_below(directories: list[str], pattern: str) -> Iterator[bytes]:
    """Return contents of the files there, each once, in a random order that is always the same."""
    found = sorted({path.resolve() for top in directories for path in Path(top).rglob(pattern)})
    Random(1).shuffle(found)
    seen = set()
    for path in found:
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if data and (digest := zlib.adler32(data) << 32 | len(data)) not in seen:
            seen.add(digest)
            yield data


def from_files(directories: list[str], pattern: str) -> Callable[[Path, int], int]:
    """Make a corpus of real files, as many as there are."""

    def write(path: Path, size: int) -> int:
        path.unlink(missing_ok=True)
        corpus = Corpus(path, size)
        for data in files_below(directories, pattern):
            if not corpus.add(data):
                break
        return corpus.file_bytes

    return write


def json_logs(path: Path, size: int) -> int:
    """Make a web service's log, one JSON object a line."""
    random = Random(2)
    path.unlink(missing_ok=True)
    corpus = Corpus(path, size)
    now = 1_700_000_000.0
    more = True
    while more:
        lines = []
        for _ in range(20_000):
            now += random.expovariate(50)
            lines.append(json.dumps({
                "time": round(now, 3), "level": random.choice(["info", "info", "info", "warning"]),
                "method": random.choice(["GET", "GET", "POST"]),
                "status": random.choice([200, 200, 304, 404]),
                "path": f"/api/v1/items/{random.randrange(10**6)}",
                "ms": round(random.lognormvariate(2, 1), 2),
                "client": f"10.{random.randrange(256)}.{random.randrange(256)}.{random.randrange(256)}",
                "request": f"{random.getrandbits(64):016x}",
            }))  # fmt: skip
        more = corpus.add(("\n".join(lines) + "\n").encode())
    return corpus.file_bytes


def database(path: Path, size: int) -> int:
    """Make an sqlite database with numbers, words and an index."""
    random = Random(3)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "db"
        with sqlite3.connect(file) as db:
            db.execute("create table t (id integer primary key, word text, amount real, note text)")
            db.execute("create index i on t (word)")
            words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(5000)]
            while file.stat().st_size < size:
                rows = [
                    (random.choice(words), random.random(), " ".join(random.choices(words, k=8)))
                    for _ in range(100_000)
                ]
                db.executemany("insert into t (word, amount, note) values (?, ?, ?)", rows)
                db.commit()
        path.unlink(missing_ok=True)
        corpus = Corpus(path, size)
        corpus.add(file.read_bytes())
    return corpus.file_bytes


def compressed(path: Path, size: int) -> int:
    """Make what does not compress any more: Python source, by zlib."""
    path.unlink(missing_ok=True)
    corpus = Corpus(path, min(size, 64 << 20))
    data = b"".join(files_below(PYTHON, "*.py"))
    while corpus.add(zlib.compress(data, 6)):
        data = data[12_345:] + data[:12_345]
    return corpus.file_bytes


PYTHON = [
    "/usr/lib/python3",
    f"/usr/lib/python3.{sys.version_info.minor}",
    str(Path(sys.prefix) / "lib"),
    "/usr/share",
]

CORPORA: dict[str, Callable[[Path, int], int]] = {
    "Python source": from_files(PYTHON, "*.py"),
    "shared libraries": from_files(["/usr/lib"], "*.so*"),
    "JSON logs": json_logs,
    "sqlite database": database,
    "compressed files": compressed,
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
    elif shutil.which("cmake") is None:
        raise SystemExit("zcache: cmake is needed to build the benchmark of the core")
    else:
        main(prog_name="scripts/run bench/zcache")
