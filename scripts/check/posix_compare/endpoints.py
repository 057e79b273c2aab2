"""Compare fifos, sockets and devices: the objects themselves, through the mount."""

import os
import select
import socket
import threading

from .case import EVERYBODY, ROOT, ROOT_AND_MEMBER, Case, Cases, attempt
from .locks import in_child
from .objects import make


def _fifo(reader: int, writer: int) -> list[object]:
    one = attempt(os.open, "fifo", reader | os.O_NONBLOCK)
    two = attempt(os.open, "fifo", writer | os.O_NONBLOCK)
    said: list[object] = [isinstance(one, int) or one, isinstance(two, int) or two]
    if isinstance(one, int) and isinstance(two, int):
        said += [
            attempt(os.write, two, b"through"),
            attempt(os.read, one, 99),
            attempt(os.read, one, 9),
        ]
        said += [attempt(os.lseek, one, 0, 0), attempt(os.fstat(one).__getattribute__, "st_size")]
    return said


def _blocking() -> list[object]:
    """Have a reader wait for its writer."""
    thread = threading.Thread(target=lambda: os.write(os.open("fifo", os.O_WRONLY), b"late"))
    thread.start()
    fd = os.open("fifo", os.O_RDONLY)
    said: list[object] = [os.read(fd, 9)]
    thread.join()
    return said


def _renamed_fifo() -> list[object]:
    one = os.open("fifo", os.O_RDWR)
    os.rename("fifo", "moved")
    two = os.open("moved", os.O_RDONLY | os.O_NONBLOCK)
    os.write(one, b"x")
    os.unlink("moved")
    return [os.read(two, 9), os.fstat(two).st_nlink]


def _stream(kind: int) -> list[object]:
    server = socket.socket(socket.AF_UNIX, kind)
    server.bind("new")
    said: list[object] = [attempt(socket.socket(socket.AF_UNIX, kind).bind, "new")]
    server.settimeout(5)
    client = socket.socket(socket.AF_UNIX, kind)
    said.append(attempt(client.connect, "new") if kind == socket.SOCK_DGRAM else None)
    if kind != socket.SOCK_DGRAM:
        server.listen()
        said.append(attempt(client.connect, "new"))
    os.rename("new", "moved")
    os.link("moved", "linked")
    for name in ("moved", "linked", "new"):
        other = socket.socket(socket.AF_UNIX, kind)
        said.append(attempt(other.connect, name))
    said.append(attempt(client.send, b"hello"))
    said.append(server.recv(9) if kind == socket.SOCK_DGRAM else server.accept()[0].recv(9))
    said += [os.path.basename(server.getsockname()), attempt(os.open, "moved", os.O_RDONLY)]
    os.unlink("moved")
    os.unlink("linked")
    said.append(attempt(socket.socket(socket.AF_UNIX, kind).connect, "moved"))
    return said


def _connect(mode: int) -> list[object]:
    """Connect to a socket of root, as somebody else."""
    server = socket.socket(socket.AF_UNIX)
    server.bind("new")
    os.chmod("new", mode)
    server.listen()

    def other() -> object:
        os.setgid(777)
        os.setuid(777)
        return attempt(socket.socket(socket.AF_UNIX).connect, "new")

    return [in_child(other)]


def _device(path: str, flags: int) -> list[object]:
    fd = os.open(path, flags)
    return [attempt(os.write, fd, b"gone"), attempt(os.read, fd, 9), os.fstat(fd).st_rdev]


def _poll(kind: str) -> object:
    fd = os.open(kind, os.O_RDWR)
    poll = select.poll()
    poll.register(fd)
    said: list[object] = [[event for _, event in poll.poll(0)]]
    epoll = select.epoll()
    return [*said, attempt(epoll.register, fd)]


def cases() -> Cases:
    access = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}
    for a, one in access.items():
        for b, two in access.items():
            yield Case(
                f"endpoints/fifo {a}, {b}",
                make("fifo"),
                lambda x=one, y=two: _fifo(x, y),
                EVERYBODY,
            )
    yield Case("endpoints/fifo, blocking", make("fifo"), _blocking, ROOT_AND_MEMBER)
    yield Case("endpoints/fifo, renamed", make("fifo"), _renamed_fifo)
    for name, kind in (
        ("stream", socket.SOCK_STREAM),
        ("dgram", socket.SOCK_DGRAM),
        ("seqpacket", socket.SOCK_SEQPACKET),
    ):
        yield Case(f"endpoints/socket, {name}", make(), lambda k=kind: _stream(k))
    for mode in (0, 0o444, 0o222, 0o600, 0o602, 0o777):
        yield Case(f"endpoints/connect to {mode:o}", make(), lambda m=mode: _connect(m), ROOT)
    for name, flags in access.items():
        for mode in (0, 0o600, 0o666):
            yield Case(
                f"endpoints/device {mode:o}, {name}",
                make("null", mode=mode),
                lambda f=flags: _device("null", f),
            )
    for file in ("file", "fifo", "null"):
        yield Case(f"endpoints/poll/{file}", make(file, mode=0o666), lambda f=file: _poll(f))
