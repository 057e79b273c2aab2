"""Run racing programs on a mount and on a plain directory (``races``; check/stress_races)."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Place
from tests.harness import races
from tests.harness.mounting import ends

SECONDS = 60.0
SCALE = 0.1


@pytest.mark.parametrize("where", ["mount", "plain"])
@pytest.mark.parametrize("kind", races.KINDS)
def test_a_race_ends_with_a_right_result(place: Place, kind: str, where: str) -> None:
    directory = place.path if where == "mount" else place.plain
    command = [sys.executable, "-I", "-S", races.__file__, kind, str(directory), str(SCALE), "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert ends(process, SECONDS), "the race does not end"
            assert process.stderr is not None
            assert process.returncode == 0, process.stderr.read()
        finally:
            process.kill()


def test_a_wrong_result_is_found(tmp_path: Path) -> None:
    """The checks of ``races`` report wrong results."""
    marks = {races.PAGE // 4: b"first***", 3 * races.PAGE // 4: b"second**"}
    page = bytearray(races.PAGE)
    for at, mark in marks.items():
        page[at : at + 8] = mark
    races.check_marks(bytes(page) * 3, marks)
    with pytest.raises(AssertionError):
        races.check_marks(bytes(page) * 3 + bytes(races.PAGE), marks)
    with pytest.raises(AssertionError), races.child((tmp_path / "absent").unlink):
        pass
