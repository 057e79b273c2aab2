"""Run an action in a forked process, as somebody else, for no longer than it may take."""

import errno
import json
import os
import resource
import select
import signal
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from .case import User

TIMEOUT_SECONDS = 20


def run(user: User, directory: str, action: Callable[[], object]) -> object:
    """Return what the action returned, or the name of its errno, or how its process ended."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of threads, which the child has no use for
        pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(user, directory, action, writer)
    os.close(writer)
    with open(reader, "rb") as results:
        ready, _, _ = select.select([results], [], [], TIMEOUT_SECONDS)
        if not ready:
            os.kill(pid, signal.SIGKILL)
        said = results.read() if ready else b""
    _, status = os.waitpid(pid, 0)
    if not ready:
        return "timed out"
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    result: object = json.loads(said)
    return result


def _child(user: User, directory: str, action: Callable[[], object], writer: int) -> NoReturn:
    mine = os.getpid()
    try:
        os.chdir(directory)
        os.umask(0o022)
        os.dup2(os.open(os.devnull, os.O_RDWR), 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        try:
            result = _plain(action())
        except OSError as exc:
            result = errno.errorcode.get(exc.errno or 0, str(exc.errno))
        said = json.dumps(result)
    except BaseException:
        said = json.dumps("bug in the case: " + traceback.format_exc())
    if os.getpid() == mine:  # not a process of the action's that failed
        os.write(writer, said.encode())
    os._exit(0)


def _plain(value: object) -> object:
    """Return what JSON can say."""
    if isinstance(value, bytes):
        return value.decode("latin-1") if len(value) < 200 else f"{len(value)} bytes, {hash_of(value)}"
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def hash_of(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()[:12]
