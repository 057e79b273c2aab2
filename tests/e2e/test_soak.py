"""Run check/soak for some seconds with real processes, mount, checks and clean-up."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.mounting import end_of, wait_until

RUN = Path(__file__).resolve().parents[2] / "scripts" / "run"


def soak(base: Path, *options: str) -> subprocess.Popen[str]:
    """Start the soak in a process group of its own."""
    engine = "python" if os.environ.get("CLEANFS_PUREPYTHON") else "native"
    words = [str(RUN), "check/soak", "--base", str(base), "--engine", engine, *options]
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHON": sys.executable},
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("coherency", ["open", "watch"])
def test_every_read_is_legal_and_nothing_is_left(tmp_path: Path, coherency: str) -> None:
    result = tmp_path / "result.json"
    base = tmp_path / "base"
    base.mkdir()
    words = ("--seconds", "1.5", "--seed", "1", "--coherency", coherency, "--json", str(result))
    process = soak(base, *words)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, output + errors
    report = json.loads(result.read_text())
    assert report["found"] == []
    assert report["counts"]["reads checked"] > 0
    assert report["stats"]["flushes"] > 0
    assert bool(report["counts"].get("read: quiet, mapping")) == (coherency == "watch")
    assert list(base.iterdir()) == []


def test_the_death_of_a_mount_is_found_and_its_evidence_kept(tmp_path: Path) -> None:
    process = soak(tmp_path, "--seconds", "60", "--seed", "2", "--coherency", "none")
    try:
        wait_until(lambda: any(tmp_path.glob("soak-*/evidence/process-2.log")), 60)
        mountpoint = next(tmp_path.glob("soak-*")) / "mnt"
        stats = json.loads((mountpoint / ".cleancache" / "stats.json").read_text())
        os.kill(stats["pid"], signal.SIGKILL)
        output, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            end_of(process, 20)
    assert process.returncode == 1
    assert "--seed 2" in errors
    evidence = next(tmp_path.glob("soak-*/evidence"))
    assert "ended with" in output
    assert (evidence / "history.txt").read_text()
    assert not os.path.ismount(mountpoint)
