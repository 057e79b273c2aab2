"""Names, attributes and writes."""

import os
import sys
from pathlib import Path

from . import contestants as who
from . import data
from .contestants import Contestant, nothing
from .lab import Clock, Lab, Mounted
from .machine import MIB, SkippedError, call, need, timed
from .results import Sample, Section
from .workloads import fio

LIST, FIND, STATUS, UNTAR = "ls -lR", "find, by time", "git status", "untar"
CREATE, UNLINK = "create files of 1 KiB", "unlink them"
WRITE, REWRITE = "128 KiB sequential writes", "4 KiB random writes"
PLAIN = "cleanfs, passthrough"
LIMIT = 90

CREATE_FILES = """
import os, sys
for number in range(int(sys.argv[2])):
    fd = os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"x" * 1024)
    os.close(fd)
"""
UNLINK_FILES = """
import os, sys
for number in range(int(sys.argv[2])):
    os.unlink(f"{sys.argv[1]}/{number}")
"""
GIT_OPTIONS = {"core.checkStat": "minimal", "core.trustctime": "false", "core.fileMode": "false"}
"""One index for all mounts, which do not agree on inode numbers."""


def bench(lab: Lab, clock: Clock) -> None:
    """A git tree whose source is in RAM; new files beside it."""
    plan = lab.plan
    source = lab.scratch / "metadata"
    work = source / "work"
    work.mkdir(parents=True)
    about = (
        "New mounts with default limits, the source in RAM, nothing synced. Passthrough is "
        "`--backend none --page-cache 0`. "
    )
    tree: Path | None = None
    archive: Path | None = None
    try:
        tree = data.unpack_tree(source / "tree", "small" if plan.tree == "small" else "whole")
        count, _ = data.count_files(tree)
        about += (
            f"The tree is the kernel's source, {count:,} files; untar unpacks {plan.unpacked}/ of it."
        )
        archive = lab.scratch / "files.tar"
        call("tar", "cf", archive, "-C", tree, plan.unpacked)
    except SkippedError as exc:
        lab.skip("metadata of a tree", exc)
        tree = archive = None
    git = tree is not None and _git(lab, tree)
    section = lab.results.section("metadata", "Metadata and writes", about)
    entrants = [
        Contestant("the source itself", "", nothing),
        Contestant("cleanfs", "", who.cleanfs()),
        Contestant(PLAIN, "", who.cleanfs("--backend", "none", "--page-cache", "0")),
        Contestant("mergerfs", "", who.mergerfs("auto-full")),
    ]
    for entrant in lab.rounds(entrants, max(1, plan.rounds - 1), clock, "metadata"):
        try:
            with lab.mounted(entrant, source) as mounted:
                if tree and entrant.name != PLAIN:
                    _tree(section, entrant.name, mounted, git)
                _writes(lab, section, entrant.name, mounted, archive)
        except SkippedError as exc:
            lab.skip(f"metadata, {entrant.name}", exc)
        finally:
            call("find", work, "-mindepth", "1", "-delete")


def _tree(section: Section, name: str, mounted: Mounted, git: bool) -> None:
    commands: dict[str, tuple[str, ...]] = {
        LIST: ("ls", "-lR"),
        FIND: ("find", ".", "-type", "f", "-newermt", "2100-01-01"),
    }
    if git:
        commands[STATUS] = ("git", "--no-optional-locks", "status", "--short")
    for workload, command in commands.items():
        seconds, cut = timed(mounted.group.inside(*command), LIMIT, mounted.path / "tree")
        section.add(workload, name, "s", Sample(seconds, at_least=cut))


def _writes(lab: Lab, section: Section, name: str, mounted: Mounted, archive: Path | None) -> None:
    plan, work, inside = lab.plan, mounted.path / "work", mounted.group.inside
    if archive:
        seconds, cut = timed(inside("tar", "xf", archive, "-C", work), LIMIT)
        section.add(UNTAR, name, "s", Sample(seconds, at_least=cut))
    files = work / "files"
    files.mkdir()
    for workload, program in ((CREATE, CREATE_FILES), (UNLINK, UNLINK_FILES)):
        command = inside(sys.executable, "-ISc", program, files, plan.small_files)
        seconds, cut = timed(command, LIMIT)
        if cut:
            raise SkippedError(f"{workload}: not done after {LIMIT} s")
        section.add(workload, name, "files/s", Sample(plan.small_files / seconds))
    file, size = work / "written", plan.write * MIB
    io = fio(mounted.group, file, "write", "128k", seconds=30, whole=True, size=size)
    section.add(WRITE, name, "MB/s", Sample(io.mb_per_second))
    io = fio(mounted.group, file, "randwrite", "4k", seconds=plan.seconds, size=size)
    section.add(REWRITE, name, "IOPS", Sample(io.iops))
    file.unlink()


def _git(lab: Lab, tree: Path) -> bool:
    """Make it a git tree: an index and a commit; the blobs themselves are of no use here."""

    def git(*arguments: str, feed: str = "") -> str:
        return call("git", "-C", tree, *arguments, input=feed).strip()

    try:
        need("git")
        git("init", "-q")
        for option, value in {
            **GIT_OPTIONS,
            "user.name": "bench",
            "user.email": "bench@localhost",
        }.items():
            git("config", option, value)
        paths = [
            os.path.relpath(path, tree)
            for top, directories, names in os.walk(tree)
            if ".git" not in Path(top).relative_to(tree).parts
            for path in (os.path.join(top, name) for name in names)
            if not os.path.islink(path)
        ]
        hashes = git("hash-object", "--no-filters", "--stdin-paths", feed="\n".join(paths)).split()
        lines = [f"100644 {digest}\t{path}" for digest, path in zip(hashes, paths, strict=True)]
        git("update-index", "--add", "--index-info", feed="\n".join(lines) + "\n")
        commit = git("commit-tree", "-m", "tree", git("write-tree", "--missing-ok"))
        git("update-ref", "HEAD", commit)
        git("status", "--short")
    except SkippedError as exc:
        lab.skip("git status", exc)
        return False
    return True
