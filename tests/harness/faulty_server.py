"""Run the FUSE server of ``faulty``: it serves a plain directory and fails on command."""

# ruff: noqa: ANN401  # pyfuse3's types do not matter here

import argparse
import errno
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyfuse3
import trio

FOREVER = -1
END = 1 << 62


@dataclass
class Fault:
    """Describes a fault of one operation."""

    op: str
    """``lookup getattr setattr readlink make unlink rmdir rename link open read write flush release
    fsync opendir readdir statfs xattr`` (a handler, or the group of handlers that create or change)."""
    error: int = 0
    """The errno of the reply; 0: none."""
    name: str | None = None
    """The name of the file; None: any file."""
    start: int = 0
    stop: int = END
    """Only these bytes of reads and writes fail. The part of a request before ``start`` is done, so the
    reply is short."""
    short: int = END
    """The most bytes that a read or write transfers at a time; 0 reads as the end of the file."""
    seconds: float = 0.0
    """The delay of the reply, in seconds."""
    hang: bool = False
    """Whether the reply waits until ``heal``."""
    late: bool = False
    """Whether the operation is done and then reported as failed."""
    count: int = FOREVER
    """How often the fault occurs."""
    size: int | None = None
    """The size in replies with attributes."""
    backwards_ns: int = 0
    """How much older the stamps in replies are."""


class Server(pyfuse3.Operations):
    """Implements the served file system. Node ids are the real inode numbers."""

    enable_acl = False

    def __init__(self, real: str, attr_timeout: float, entry_timeout: float) -> None:
        super().__init__()
        self._attr_timeout = attr_timeout
        self._entry_timeout = entry_timeout
        self._generation = 1
        self._faults: list[Fault] = []
        self._healed = trio.Event()
        self._served: dict[str, int] = {}
        self._hanging = 0
        self._fds = {pyfuse3.ROOT_INODE: os.open(real, os.O_PATH)}
        self._names: dict[int, str] = {pyfuse3.ROOT_INODE: ""}
        self._open_names: dict[int, str] = {}

    # -- commands -----------------------------------------------------------------------------

    async def listen(self, address: str) -> None:
        """Execute one command per connection."""
        with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_SEQPACKET) as listener:
            await listener.bind(address)
            listener.listen(64)
            while True:
                sock, _ = await listener.accept()
                with sock:
                    command = json.loads(await sock.recv(1 << 16))
                    await sock.send(json.dumps(self._execute(command)).encode())

    def _execute(self, command: dict[str, Any]) -> dict[str, Any]:
        match command.pop("do"):
            case "fault":
                self._faults.append(Fault(**command))
            case "heal":
                self._faults.clear()
                self._healed.set()
                self._healed = trio.Event()
            case "replace":
                self._generation += 1
            case "served":
                return {"served": self._served.get(command["op"], 0), "hanging": self._hanging}
        return {}

    def _find(self, op: str, name: str, offset: int, size: int) -> Fault | None:
        for fault in self._faults:
            overlaps = offset < fault.stop and offset + size > fault.start
            if fault.op == op and fault.name in (None, name) and overlaps and fault.count:
                fault.count -= fault.count > 0
                return fault
        return None

    async def _apply_fault(self, op: str, name: str, offset: int = 0, size: int = 1) -> Fault | None:
        """Apply a fault, if one matches: wait, raise its error, or return it."""
        self._served[op] = self._served.get(op, 0) + 1
        fault = self._find(op, name, offset, size)
        if fault is None:
            return None
        if fault.seconds:
            await trio.sleep(fault.seconds)
        if fault.hang:
            self._hanging += 1
            await self._healed.wait()
            self._hanging -= 1
        if fault.error and offset >= fault.start and not fault.late:
            raise pyfuse3.FUSEError(fault.error)
        return fault

    # -- handlers -----------------------------------------------------------------------------

    def _path(self, inode: int, name: bytes = b"") -> bytes:
        return b"/proc/self/fd/%d" % self._fds[inode] + (b"/" + name if name else b"")

    def _entry(self, st: os.stat_result, name: str, fault: Fault | None = None) -> Any:
        entry = pyfuse3.EntryAttributes()
        for field in (
            *("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size"),
            *("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blksize", "st_blocks"),
        ):
            setattr(entry, field, getattr(st, field))
        attr = fault if fault is not None else self._find("attributes", name, 0, 1)
        if attr is not None:
            if attr.size is not None:
                entry.st_size = attr.size
            entry.st_mtime_ns -= attr.backwards_ns
            entry.st_ctime_ns -= attr.backwards_ns
        entry.generation = self._generation
        entry.attr_timeout, entry.entry_timeout = self._attr_timeout, self._entry_timeout
        return entry

    def _found(self, parent: int, name: bytes) -> Any:
        """Look up in the real directory."""
        fd = os.open(self._path(parent, name), os.O_PATH | os.O_NOFOLLOW)
        st = os.fstat(fd)
        if st.st_ino in self._fds:
            os.close(fd)
        else:
            self._fds[st.st_ino] = fd
        self._names[st.st_ino] = os.fsdecode(name)
        return self._entry(st, os.fsdecode(name))

    async def _do(self, op: str, name: bytes, call: Callable[[], Any]) -> Any:
        fault = await self._apply_fault(op, os.fsdecode(name))
        try:
            result = call()
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from exc
        if fault is not None and fault.late:
            raise pyfuse3.FUSEError(fault.error)
        return result

    def _name(self, inode: int) -> bytes:
        return os.fsencode(self._names[inode])

    async def lookup(self, parent: int, name: bytes, ctx: Any) -> Any:
        return await self._do("lookup", name, lambda: self._found(parent, name))

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        name = self._name(inode)
        return await self._do(
            "getattr", name, lambda: self._entry(os.fstat(self._fds[inode]), os.fsdecode(name))
        )

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        def change() -> Any:
            path = self._path(inode)
            if fields.update_size:
                os.truncate(path if fh is None else fh, attr.st_size)
            if fields.update_mode:
                os.chmod(path, attr.st_mode & 0o7777)
            if fields.update_uid or fields.update_gid:
                uid = attr.st_uid if fields.update_uid else -1
                os.chown(path, uid, attr.st_gid if fields.update_gid else -1)
            if fields.update_mtime:
                os.utime(path, ns=(attr.st_mtime_ns, attr.st_mtime_ns))
            return self._entry(os.fstat(self._fds[inode]), self._names[inode])

        return await self._do("setattr", self._name(inode), change)

    async def readlink(self, inode: int, ctx: Any) -> Any:
        fd = self._fds[inode]
        return await self._do("readlink", self._name(inode), lambda: os.readlink(b"", dir_fd=fd))

    def _made(self, parent: int, name: bytes, make: Callable[[bytes], None]) -> Callable[[], Any]:
        def call() -> Any:
            make(self._path(parent, name))
            return self._found(parent, name)

        return call

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        return await self._do("make", name, self._made(parent, name, lambda p: os.mknod(p, mode, rdev)))

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> Any:
        return await self._do("make", name, self._made(parent, name, lambda p: os.mkdir(p, mode)))

    async def symlink(self, parent: int, name: bytes, target: bytes, ctx: Any) -> Any:
        return await self._do("make", name, self._made(parent, name, lambda p: os.symlink(target, p)))

    async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        await self._do("unlink", name, lambda: os.unlink(self._path(parent, name)))

    async def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
        await self._do("rmdir", name, lambda: os.rmdir(self._path(parent, name)))

    async def rename(
        self, old: int, old_name: bytes, new: int, new_name: bytes, flags: int, ctx: Any
    ) -> None:
        def call() -> None:
            os.rename(self._path(old, old_name), self._path(new, new_name))

        await self._do("rename", old_name, call)

    async def link(self, inode: int, parent: int, name: bytes, ctx: Any) -> Any:
        def make(path: bytes) -> None:
            os.link(self._path(inode), path, follow_symlinks=True)

        return await self._do("link", name, self._made(parent, name, make))

    def _opened(self, fd: int, name: bytes) -> Any:
        self._open_names[fd] = os.fsdecode(name)
        return pyfuse3.FileInfo(fh=fd, direct_io=True, keep_cache=False)

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        name = self._name(inode)
        flags &= ~(os.O_APPEND | os.O_DIRECT)
        path = self._path(inode)
        return await self._do("open", name, lambda: self._opened(os.open(path, flags), name))

    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        def call() -> Any:
            plain = flags & ~(os.O_APPEND | os.O_DIRECT | os.O_NOFOLLOW)
            fd = os.open(self._path(parent, name), plain | os.O_CREAT, mode)
            return self._opened(fd, name), self._found(parent, name)

        return await self._do("make", name, call)

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        fault = await self._apply_fault("read", self._open_names[fh], offset, size)
        if fault is not None:
            size = min(size, fault.short, fault.start - offset if fault.error else END)
        return os.pread(fh, size, offset)

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        fault = await self._apply_fault("write", self._open_names[fh], offset, len(data))
        if fault is not None:
            data = data[: min(fault.short, fault.start - offset if fault.error else END)]
        try:
            return os.pwrite(fh, data, offset)
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from exc

    async def flush(self, fh: int) -> None:
        await self._apply_fault("flush", self._open_names[fh])

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._apply_fault("fsync", self._open_names[fh])

    async def release(self, fh: int) -> None:
        await self._apply_fault("release", self._open_names.pop(fh))
        os.close(fh)

    async def opendir(self, inode: int, ctx: Any) -> Any:
        return await self._do("opendir", self._name(inode), lambda: inode)

    async def readdir(self, fh: int, start: int, token: Any) -> None:
        fault = await self._apply_fault("readdir", self._names[fh], start)
        names = sorted(os.fsencode(name) for name in os.listdir(self._path(fh)))
        for position, name in enumerate(names[start:], start + 1):
            if fault is not None and fault.error and position > fault.start:
                break
            try:
                entry = self._found(fh, name)
            except FileNotFoundError:
                continue
            if not pyfuse3.readdir_reply(token, name, entry, position):
                break

    async def releasedir(self, fh: int) -> None:
        pass

    async def statfs(self, ctx: Any) -> Any:
        await self._apply_fault("statfs", "")
        st, data = os.statvfs(self._path(pyfuse3.ROOT_INODE)), pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree"):
            setattr(data, name, getattr(st, name))
        return data

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> Any:
        await self._apply_fault("xattr", self._names[inode])
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)


def main() -> None:
    """Serve until unmounted."""
    trio.run(_main)


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("real")
    parser.add_argument("path")
    parser.add_argument("address")
    parser.add_argument("--attr-timeout", type=float, default=0.0)
    parser.add_argument("--entry-timeout", type=float, default=0.0)
    args = parser.parse_args()
    logging.basicConfig(level="WARNING")
    os.umask(0)
    server = Server(args.real, args.attr_timeout, args.entry_timeout)
    pyfuse3.init(server, args.path, {"fsname=faulty", "allow_other"})
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.listen, "\0" + args.address[1:])
            await pyfuse3.main(max_tasks=10_000)
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
