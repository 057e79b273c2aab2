"""Find out what this machine has, and run commands on it."""

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

MIB = 1 << 20


class SkippedError(Exception):
    """The machine lacks something, or a contestant failed; the message says what."""


def need(*tools: str) -> None:
    """Skip unless these programs are there."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise SkippedError(f"{', '.join(missing)} not installed")


Command = Sequence[str | Path | int]


def call(*command: str | Path | int, timeout: float = 300, **options: object) -> str:
    """Run to the end and give what it printed; SkippedError, with its complaint, when it fails."""
    argv = [str(part) for part in command]
    try:
        done = subprocess.run(
            argv, check=True, capture_output=True, text=True, timeout=timeout, **options
        )  # type: ignore[call-overload]  # passed on
    except subprocess.CalledProcessError as exc:
        complaint = (exc.stderr or exc.stdout or "").strip().splitlines()[-1:]
        raise SkippedError(f"{argv[0]} failed ({exc.returncode}): {' '.join(complaint)}") from exc
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise SkippedError(f"{argv[0]}: {exc}") from exc
    output: str = done.stdout
    return output


def timed(
    command: Command, limit: float, cwd: Path | None = None, accept: Sequence[int] = (0,)
) -> tuple[float, bool]:
    """Return the seconds that a command took, and whether the limit ended it. Its output is read away.

    The command gets a session of its own, so that ending it ends its children.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        cwd=cwd, start_new_session=True,
    )  # fmt: skip
    drain = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.close()
    try:
        code = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return limit, True
    finally:
        elapsed = time.monotonic() - start
        end_session(process)
        drain.wait()
    if code not in accept:
        raise SkippedError(f"{Path(str(command[-1])).name}: a workload failed with status {code}")
    return elapsed, False


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a command that leads a session, with its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def mounts() -> list[str]:
    """Return the lines of the mount table; names in it may be any bytes."""
    return os.fsdecode(Path("/proc/self/mounts").read_bytes()).splitlines()


def facts() -> dict[str, str]:
    """Describe the machine in a few words, for the report."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    system = "Linux"
    with contextlib.suppress(OSError):
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    found = {
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release(),
        "system": system,
        "python": platform.python_version(),
        "load": f"{os.getloadavg()[0]:.1f} at the start",
    }
    for tool, arguments in {
        "mergerfs": ["--version"], "bindfs": ["--version"], "rclone": ["version"],
        "mkfs.btrfs": ["--version"], "fio": ["--version"],
    }.items():  # fmt: skip
        if shutil.which(tool):
            try:
                text = call(tool, *arguments).split("\n")[0]
            except SkippedError:
                continue
            found[tool] = text.replace(tool, "").replace("version", "").strip(" ,:-v")
    return found
