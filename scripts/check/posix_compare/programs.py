"""Execute programs: who may, as whom, and while who writes."""

import mmap
import os
import shutil
import sys

from .case import OWNER, TEAM, USERS, Case, Cases, attempt
from .locks import in_child

IDENTITY = "/usr/bin/id"
MODES = (
    0,
    0o400,
    0o111,
    0o711,
    0o755,
    0o655,
    0o745,
    0o754,
    0o4755,
    0o2755,
    0o6755,
    0o2745,
    0o700,
    0o070,
)


def _program(mode: int, uid: int = OWNER, gid: int = TEAM) -> None:
    shutil.copyfile(IDENTITY, "program")
    os.chown("program", uid, gid)
    os.chmod("program", mode)


def _script(mode: int, line: str = "#!/bin/sh") -> None:
    with open("script", "w", encoding="ascii") as file:
        file.write(f"{line}\necho ran as $(id -u)\n")
    os.chown("script", OWNER, TEAM)
    os.chmod("script", mode)


def output(path: str, *args: str) -> object:
    """Return what a program prints, or why it does not run."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(writer, 1)
        try:
            os.execv(path, [path, *args])
        except OSError as exc:
            os.write(1, str(exc.errno).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as said:
        text = said.read()
    return [text.strip(), os.waitpid(pid, 0)[1]]


def _identity() -> list[object]:
    return [output("./program", "-u"), output("./program", "-g"), output("./program", "-ru")]


def _busy() -> list[object]:
    """A program that runs may not be written, one that is written may not run."""
    fd = os.open("program", os.O_WRONLY)
    said = [in_child(lambda: os.execv("./program", ["x"]))]
    os.close(fd)
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(reader, 0)
        os.close(writer)
        os.execv("./sleeper", ["sleeper"])
    os.close(reader)
    for _ in range(200):
        if os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "sleeper":
            break
    said += [
        attempt(os.open, "sleeper", flags)
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC)
    ]
    said += [attempt(os.truncate, "sleeper", 5), attempt(os.unlink, "sleeper")]
    os.close(writer)
    os.waitpid(pid, 0)
    return said


def _two_programs() -> None:
    _program(0o777)
    shutil.copyfile("/bin/cat", "sleeper")
    os.chmod("sleeper", 0o777)


def _replaced() -> list[object]:
    """A program is replaced by another; the next start runs the new one."""
    first = output("./script")
    with open("new", "w", encoding="ascii") as file:
        file.write("#!/bin/sh\necho second\n")
    os.chmod("new", 0o755)
    os.rename("new", "script")
    return [first, output("./script")]


def _mapped() -> list[object]:
    fd = os.open("program", os.O_RDONLY)
    with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC) as area:
        return [area[1:4], len(area)]


def cases() -> Cases:
    for mode in MODES:
        for owner, uid in ("owner", OWNER), ("other", USERS["other"].uid):
            yield Case(
                f"programs/{mode:o} of {owner}",
                lambda m=mode, u=uid: _program(m, u),
                _identity,
                ("root", "owner", "member") if owner == "owner" else ("member",),
            )
        yield Case(f"programs/script {mode:o}", lambda m=mode: _script(m), lambda: output("./script"))
    for name, line in (
        ("empty", ""),
        ("missing interpreter", "#!/nonexistent/x"),
        ("directory", "#!/tmp"),
    ):
        yield Case(
            f"programs/script, {name}",
            lambda line=line: _script(0o755, line),
            lambda: output("./script"),
            ("member",),
        )
    yield Case("programs/busy", _two_programs, _busy, ("root", "owner"))
    yield Case("programs/replaced", lambda: _script(0o755), _replaced)
    yield Case("programs/mapped", lambda: _program(0o755), _mapped)
    if sys.platform == "linux":
        yield Case("programs/of root, set-id", lambda: _program(0o4755, 0, 0), _identity)
