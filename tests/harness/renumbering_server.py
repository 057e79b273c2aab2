"""Run the FUSE server of ``renumbering``: it renumbers files once the kernel has forgotten them.

It speaks to /dev/fuse itself, because libraries do not separate node ids, generations and inode
numbers.
"""

import argparse
import ctypes
import errno
import os
import signal
import stat
import struct
import threading
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

IN_HEADER = struct.Struct("<IIQQIIII")
OUT_HEADER = struct.Struct("<IiQ")
ENTRY_OUT = struct.Struct("<QQQQII")
ATTR_OUT = struct.Struct("<QII")
ATTR = struct.Struct("<6Q10I")
INIT_OUT = struct.Struct("<IIIIHHIIHHI24x")
SETATTR_IN = struct.Struct("<IIQQQQQQIIIII")

LOOKUP, FORGET, GETATTR, SETATTR, MKDIR, UNLINK, RMDIR = 1, 2, 3, 4, 9, 10, 11
RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC = 12, 13, 14, 15, 16, 17, 18, 20
FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = 25, 26, 27, 28, 29
CREATE, BATCH_FORGET, RENAME2 = 35, 42, 45
NOTIFY_INVAL_ENTRY = 3

ROOT = 1


class Server:
    """Implements the served file system."""

    def __init__(self, real: str, numbers: str, timeout: float, whole_seconds: bool) -> None:
        self._real = os.fsencode(real)
        self._numbers = numbers
        self._timeout = divmod(int(timeout * 1e9), 1_000_000_000)
        self._whole_seconds = whole_seconds
        self._fresh = count(ROOT + 1)
        self._paths = {ROOT: b""}
        self._nodes = {b"": ROOT}
        self._lookups = {ROOT: 1}
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)

    def mount(self, path: str) -> None:
        """Mount the file system. Raises OSError."""
        options = (
            f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        )
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"renumbering", os.fsencode(path), b"fuse.renumbering", 6, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")

    def serve(self) -> None:
        """Reply to requests until unmounted."""
        while True:
            try:
                message = os.read(self._device, (1 << 20) + 4096)
            except OSError as exc:
                if exc.errno == errno.ENODEV:
                    return
                raise
            _, opcode, unique, node, *_ = IN_HEADER.unpack_from(message)
            body = message[IN_HEADER.size :]
            if opcode == FORGET:
                self._forget(node, *struct.unpack("<Q", body[:8]))
                continue
            if opcode == BATCH_FORGET:
                for one in struct.iter_unpack(
                    "<QQ", body[8 : 8 + 16 * struct.unpack("<I", body[:4])[0]]
                ):
                    self._forget(*one)
                continue
            try:
                error, reply = 0, self._reply(opcode, node, body)
            except OSError as exc:
                error, reply = -(exc.errno or errno.EIO), b""
            with suppress(FileNotFoundError):  # the request was interrupted
                header = OUT_HEADER.pack(OUT_HEADER.size + len(reply), error, unique)
                os.write(self._device, header + reply)

    def invalidate(self) -> None:
        """Make the kernel drop every unused name."""
        for node, path in sorted(self._paths.items(), key=lambda item: -item[1].count(b"/")):
            parent, _, name = path.rpartition(b"/")
            if node != ROOT and parent in self._nodes:
                body = struct.pack("<QII", self._nodes[parent], len(name), 0) + name + b"\0"
                header = OUT_HEADER.pack(OUT_HEADER.size + len(body), NOTIFY_INVAL_ENTRY, 0)
                with suppress(OSError):
                    os.write(self._device, header + body)

    # -- nodes ------------------------------------------------------------------------------------

    def _path(self, node: int, name: bytes = b"") -> bytes:
        return self._real + self._paths[node] + (b"/" + name if name else b"")

    def _found(self, path: bytes) -> int:
        """Return the node of a path, with one more reference."""
        node = self._nodes.get(path)
        if node is None:
            node = next(self._fresh)
            if self._numbers == "again":
                node = next(n for n in count(ROOT + 1) if n not in self._paths)
            self._nodes[path], self._paths[node], self._lookups[node] = node, path, 0
        self._lookups[node] += 1
        return node

    def _forget(self, node: int, nlookup: int) -> None:
        self._lookups[node] -= nlookup
        if self._lookups[node] == 0 and node != ROOT:
            del self._lookups[node]
            path = self._paths.pop(node)
            if self._nodes.get(path) == node:
                del self._nodes[path]

    def _moved(self, old: bytes, new: bytes) -> None:
        self._nodes.pop(new, None)
        for path, node in list(self._nodes.items()):
            if path == old or path.startswith(old + b"/"):
                del self._nodes[path]
                self._paths[node] = new + path[len(old) :]
                self._nodes[self._paths[node]] = node

    def _attributes(self, node: int, st: os.stat_result) -> bytes:
        ino = 7 if self._numbers == "one" and not stat.S_ISDIR(st.st_mode) else node
        stamps = [divmod(ns, 1_000_000_000) for ns in (st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns)]
        if self._whole_seconds:
            stamps = [(seconds, 0) for seconds, _ in (stamps[0], stamps[1], stamps[1])]
        return ATTR.pack(
            *(ino, st.st_size, st.st_blocks, *(seconds for seconds, _ in stamps)),
            *(nanoseconds for _, nanoseconds in stamps),
            *(st.st_mode, st.st_nlink, st.st_uid, st.st_gid, 0, 4096, 0),
        )

    def _entry(self, node: int, name: bytes) -> bytes:
        st = os.lstat(self._path(node, name))
        found = self._found(self._paths[node] + b"/" + name)
        seconds, nanoseconds = self._timeout
        timeouts = (seconds, seconds, nanoseconds, nanoseconds)
        return ENTRY_OUT.pack(found, 0, *timeouts) + self._attributes(found, st)

    def _attr(self, node: int) -> bytes:
        seconds, nanoseconds = self._timeout
        return ATTR_OUT.pack(seconds, nanoseconds, 0) + self._attributes(
            node, os.lstat(self._path(node))
        )

    # -- requests ---------------------------------------------------------------------------------

    def _reply(self, opcode: int, node: int, body: bytes) -> bytes:
        match opcode:
            case x if x == INIT:
                # BIG_WRITES; minor 31 has the sizes used here.
                return INIT_OUT.pack(7, 31, 1 << 17, 1 << 5, 16, 12, 1 << 17, 1, 32, 0, 0)
            case x if x == LOOKUP:
                return self._entry(node, body[:-1])
            case x if x == GETATTR:
                return self._attr(node)
            case x if x == SETATTR:
                self._set_attributes(node, *SETATTR_IN.unpack_from(body))
                return self._attr(node)
            case x if x == OPEN:
                flags = struct.unpack_from("<I", body)[0] & ~(os.O_APPEND | os.O_DIRECT | os.O_CREAT)
                return struct.pack("<QII", os.open(self._path(node), flags), 0, 0)
            case x if x == CREATE:
                flags, mode = struct.unpack_from("<II", body)
                name = body[16:-1]
                flags &= ~(os.O_APPEND | os.O_DIRECT)
                fd = os.open(self._path(node, name), flags | os.O_CREAT, mode & 0o7777)
                return self._entry(node, name) + struct.pack("<QII", fd, 0, 0)
            case x if x == READ:
                fd, offset, size = struct.unpack_from("<QQI", body)
                return os.pread(fd, size, offset)
            case x if x == WRITE:
                fd, offset, size = struct.unpack_from("<QQI", body)
                return struct.pack("<II", os.pwrite(fd, body[40 : 40 + size], offset), 0)
            case x if x == RELEASE:
                os.close(*struct.unpack_from("<Q", body))
                return b""
            case x if x == OPENDIR:
                return struct.pack("<QII", 0, 0, 0)
            case x if x == READDIR:
                return self._list(node, *struct.unpack_from("<QQI", body))
            case x if x in (FLUSH, FSYNC, RELEASEDIR):
                return b""
            case x if x == STATFS:
                return struct.pack("<5QIIII24x", 1000, 1000, 1000, 1000, 1000, 4096, 255, 4096, 0)
            case x if x == MKDIR:
                os.mkdir(self._path(node, body[8:-1]), struct.unpack_from("<I", body)[0] & 0o7777)
                return self._entry(node, body[8:-1])
            case x if x in (UNLINK, RMDIR):
                (os.unlink if x == UNLINK else os.rmdir)(self._path(node, body[:-1]))
                self._nodes.pop(self._paths[node] + b"/" + body[:-1], None)
                return b""
            case x if x == LINK:
                os.link(self._path(*struct.unpack_from("<Q", body)), self._path(node, body[8:-1]))
                return self._entry(node, body[8:-1])
            case x if x in (RENAME, RENAME2):
                (to,) = struct.unpack_from("<Q", body)
                old, new = body[8 if x == RENAME else 16 : -1].split(b"\0")
                os.rename(self._path(node, old), self._path(to, new))
                self._moved(self._paths[node] + b"/" + old, self._paths[to] + b"/" + new)
                return b""
        raise OSError(errno.ENOSYS, "not implemented")

    def _set_attributes(self, node: int, valid: int, *fields: int) -> None:
        _, _, size, _, _, mtime, _, _, mtime_ns, _, mode, *_ = fields
        path = self._path(node)
        if valid & 1 << 0:
            os.chmod(path, mode & 0o7777)
        if valid & 1 << 3:
            os.truncate(path, size)
        if valid & 1 << 8:
            os.utime(path)
        elif valid & 1 << 5:
            os.utime(path, ns=(os.lstat(path).st_atime_ns, mtime * 1_000_000_000 + mtime_ns))

    def _list(self, node: int, _: int, offset: int, size: int) -> bytes:
        reply = b""
        names = [b".", b"..", *sorted(os.listdir(self._path(node)))]
        for position, name in enumerate(names[offset:], offset + 1):
            entry = struct.pack("<QQII", 1 << 32 | position, position, len(name), 0) + name
            entry = entry.ljust(-(-len(entry) // 8) * 8, b"\0")
            if len(reply) + len(entry) > size:
                break
            reply += entry
        return reply


def main() -> None:
    """Serve until unmounted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("real")
    parser.add_argument("path")
    parser.add_argument("--numbers", choices=["fresh", "again", "one"], default="fresh")
    parser.add_argument("--timeout", type=float, default=0.0)
    parser.add_argument("--whole-seconds", action="store_true")
    args = parser.parse_args()
    os.umask(0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    server = Server(args.real, args.numbers, args.timeout, args.whole_seconds)
    server.mount(args.path)

    def forget_on_signal() -> None:
        while True:
            signal.sigwait({signal.SIGUSR1})
            server.invalidate()
            time.sleep(0.05)  # the kernel sends FORGET in this time
            Path(args.path + ".forgotten").touch()

    threading.Thread(target=forget_on_signal, daemon=True).start()
    server.serve()


if __name__ == "__main__":
    main()
