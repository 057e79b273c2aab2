"""Test the comparison: ratios by round, wrong calls, and a real row."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from scripts.bench.compare.__main__ import main
from scripts.bench.compare.contestants import cleanfs_of
from scripts.bench.compare.machine import SkippedError
from scripts.bench.compare.results import Sample, Section

ROOT = Path(__file__).resolve().parents[2]


def test_a_ratio_is_that_of_values_of_the_same_round() -> None:
    section = Section("", "")
    for own, other in ((10, 20), (100, 50), (30, 10)):
        section.add("w", "cleanfs", "", Sample(own))
        section.add("w", "bindfs", "", Sample(other))
    ratio = section.ratio("w", "bindfs")
    assert ratio is not None
    assert [sample.value for sample in ratio.samples] == [0.5, 2, 3]
    assert section.ratio("w", "cleanfs") is None
    section.add("w", "bindfs", "", Sample(1))
    assert section.ratio("w", "bindfs") is None, "a round is missing"


def test_a_baseline_that_runs_this_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n'
    )
    (tmp_path / ".venv/bin/python").chmod(0o755)
    with pytest.raises(SkippedError, match=f"its Python imports {ROOT}/cleanfs"):
        cleanfs_of(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes control groups")
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--rows", "nothing", "there is no 'nothing'; there are equal-ram, "),
        ("--contestants", "cleanfs,nobody", "there is no 'nobody'; there are source, "),
        ("--contestants", "baseline", "the contestant baseline needs --baseline CHECKOUT"),
    ],
)
def test_a_wrong_call_says_what_is_right(option: str, value: str, said: str) -> None:
    done = CliRunner().invoke(main, [option, value])
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.skipif(os.geteuid() != 0, reason="takes control groups")
def test_a_row_gives_figures_of_all_contestants(tmp_path: Path) -> None:
    result = tmp_path / "json"
    command: list[str | Path] = [
        ROOT / "scripts/run", "bench/compare", "--quick", "--rows", "create", "--contestants",
        "source,cleanfs,baseline", "--baseline", ROOT, "--directory", tmp_path, "--json", result,
    ]  # fmt: skip
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(result.read_text())
    assert not report["skipped"]
    created = report["sections"]["create"]["workloads"]
    assert set(created["create, empty"]) == {"the source itself", "cleanfs", "baseline"}
    assert set(created["create, empty, CPU of the daemon"]) == {"cleanfs", "baseline"}
    assert all(cell["median"] > 0 for row in created.values() for cell in row.values())
    assert len(created["create, empty"]["baseline"]["cleanfs_over_it"]) == 1
    assert not list(tmp_path.glob("cleanfs-compare-*")), "it leaves nothing behind"
