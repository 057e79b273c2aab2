"""Run a part of check/posix_compare: all differences are explained in docs/limits.md."""

import os
import re
from pathlib import Path

import pytest

from scripts.check.posix_compare.case import ROOT, Case
from scripts.check.posix_compare.explained import EXPLANATIONS, explain
from scripts.check.posix_compare.groups import select
from scripts.check.posix_compare.objects import make
from scripts.check.posix_compare.run import compare
from scripts.check.posix_compare.sites import Site
from tests.harness.mounting import mounted

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acting as other users needs root")

LIMITS = Path(__file__).parents[2] / "docs" / "limits.md"

SAMPLE = (
    ("data/append*", 1),
    ("setid/*", 29),
    ("xattrs/*", 31),
    ("renames/*", 97),
    ("opens/*", 149),
    ("paths/*", 127),
    ("permissions/*", 127),
    ("gone/*", 61),
    ("attributes/*", 67),
    ("mappings/*", 61),
)
"""Patterns with a step: every n-th of their cases is run."""


@needs_root
@pytest.mark.parametrize(
    ("options", "step"), [((), 7), (("--coherency", "none"), 19)], ids=["open", "alone"]
)
def test_system_calls_work_as_on_a_plain_directory(
    source: Path, mountpoint: Path, options: tuple[str, ...], step: int
) -> None:
    plain = source.with_name("plain")
    plain.mkdir()
    for directory in source.parents[:3]:
        directory.chmod(directory.stat().st_mode | 0o011)
    jobs = [job for pattern, every in SAMPLE for job in select((pattern,), every=every * step)]
    with mounted(source, mountpoint, "--allow-other", "-o", "suid,dev", *options):
        here, there = (
            Site(plain, {"plain": plain}),
            Site(mountpoint, {"mount": mountpoint, "source": source}),
        )
        found = list(compare(here, there, jobs))
    assert not [difference for difference in found if explain(difference, options) is None]


def _change(where: str) -> None:
    if where in os.getcwd():
        os.chmod("dir", 0o700)


@needs_root
def test_a_case_that_differs_is_found(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for site in one, other:
        site.mkdir()
    cases = (
        Case("result", make("file"), lambda: "one" in os.getcwd(), ROOT),
        Case("mode", make("dir"), lambda: _change("one"), ROOT),
        Case("same", make("file"), lambda: os.write(os.open("file", os.O_RDWR), b"x"), ROOT),
    )
    here, there = Site(one, {"plain": one}), Site(other, {"mount": other})
    found = compare(here, there, [(case, "root") for case in cases])
    assert [(each.case, each.aspect) for each in found] == [
        ("result", "result"),
        ("mode", "mount: work/dir: ctime"),
        ("mode", "mount: work/dir: mode"),
    ]


def test_each_explanation_is_a_heading_of_the_documentation() -> None:
    headings = set(re.findall(r"^## (.*)$", LIMITS.read_text(encoding="utf-8"), re.MULTILINE))
    assert {explanation.heading for explanation in EXPLANATIONS} == headings
