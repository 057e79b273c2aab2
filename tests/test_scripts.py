"""Test the output of the scripts: set-up, the conclusion of the demonstration, the launcher."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.demo import Pass, conclusion

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Make a tree with only the set-up script, on a simulated machine without packages."""
    programs = tmp_path / "programs"
    (tmp_path / "scripts").mkdir()
    programs.mkdir()
    shutil.copy(ROOT / "scripts/setup", tmp_path / "scripts/setup")
    write_program(programs / "dpkg-query", "exit 1")
    write_program(programs / "sudo", 'exec "$@"')
    write_program(
        programs / "apt-get", 'seq 100; echo "E: no network" >&2; [ "$1" != install ] || exit 100'
    )
    return tmp_path


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_failing_set_up_names_its_log_and_shows_the_end_of_it(bare: Path) -> None:
    path = f"{bare}/programs:{os.environ['PATH']}"
    done = subprocess.run(
        [bare / "scripts/setup"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 100
    output = done.stdout.splitlines()
    assert output[0].startswith("setup: these Debian packages are missing: fuse3 ")
    assert output[1] == "setup: the list of Debian packages ..."
    assert output[2].startswith("setup: the list of Debian packages: done in ")
    assert len(output) == 4, "the output of apt goes to the log"
    complaint = done.stderr.splitlines()
    assert complaint[0].endswith(f"failed with status 100. The end of {bare}/setup.log:")
    assert complaint[-1].strip() == "E: no network"
    assert len(complaint) == 16


def passes(direct: float, first: float, second: float) -> list[Pass]:
    return [
        Pass("cp -r, source", direct, 100, 100),
        Pass("cp -r, 1st", first, 100, 100, 0.0, 2.0),
        Pass("cp -r, 2nd", second, 100, 0, 1.0, 2.0),
    ]


def test_the_conclusion_names_the_slower_steps() -> None:
    good = conclusion(passes(4, 5, 1))
    assert "read 0 B: cp -r took 1.0 s (first time 5.0 s, without cleanfs 4.0 s)." in good
    assert "slower" not in good
    assert "slower than this source alone" in conclusion(passes(1, 5, 2))
    assert "slower than the first." in conclusion(passes(1, 2, 3))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    command = [str(ROOT / "scripts/run"), *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_launcher_lists_every_program_with_a_sentence() -> None:
    lines = run().stdout.splitlines()
    programs = {
        path.relative_to(ROOT / "scripts").with_suffix("").as_posix()
        for kind in ("bench", "check")
        for path in (ROOT / "scripts" / kind).glob("*")
        if path.name != "__init__.py" and (path.suffix == ".py" or (path / "__main__.py").exists())
    }
    assert {line.split()[0] for line in lines} == programs
    assert not [line for line in lines if not line.endswith(".")]


def test_the_launcher_starts_a_program_and_refuses_an_unknown_one() -> None:
    assert run("check/limits", "--help").stdout.startswith("Usage: scripts/run check/limits ")
    for word in ("check/none", "limits", "../scripts/check/limits"):
        done = run(word)
        assert done.returncode == 2
        assert done.stderr == f"run: there is no {word}: scripts/run lists what there is\n"
