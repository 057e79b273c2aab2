#!/bin/bash
# A FUSE WRITE does not say whether the program gave RWF_NOAPPEND (or RWF_APPEND): its `flags` are those of the open file.
#
# Linux 6.18.44. The kernel puts f_flags into the message (fuse_write_flags), and not what pwritev2(2) was given. So on a
# file with O_APPEND a write to a chosen offset (RWF_NOAPPEND, Linux 6.9) looks like an append by a kernel that sees an
# earlier end of the file than the server does, as after another client has appended. A server that must append such
# writes at its own end, not to overwrite the other's data, appends both.
#
# Seen, for a file that the kernel was told is 8 bytes long: "append: offset 8, O_APPEND True",
# "RWF_NOAPPEND at 9: offset 9, O_APPEND True", "append: offset 10, O_APPEND True", "RWF_NOAPPEND at 0: offset 0, O_APPEND
# True", "RWF_APPEND without O_APPEND: offset 11, O_APPEND False"
set -eu
[ "$(id -u)" = 0 ] || { echo "needs root" >&2; exit 2; }
work=$(mktemp -d)
trap 'umount -l "$work/mnt" 2>/dev/null || true; rm -rf "$work"' EXIT
mkdir "$work/mnt"
cat >"$work/finding.py" <<'END'
import os
import stat
import struct
import subprocess
import sys
import threading

MNT = sys.argv[1]
RWF_APPEND, RWF_NOAPPEND = 0x10, 0x20
HEADER, OUT = struct.Struct("=IIQQIIIHH"), struct.Struct("=IiQ")
LOOKUP, GETATTR, OPEN, WRITE, INIT, FLUSH, RELEASE = 1, 3, 14, 16, 26, 25, 18


def attr(node):
    mode = stat.S_IFDIR | 0o755 if node == 1 else stat.S_IFREG | 0o644
    return struct.pack("=QQQQQQIIIIIIIIII", node, 8, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def reply_to(opcode, node, body):
    if opcode == INIT:
        major, minor, ahead, _ = struct.unpack_from("=IIII", body)
        return struct.pack("=IIIIHHIIHHIIH", 7, min(minor, 36), ahead, 0, 16, 12, 65536, 1, 16, 0, 0, 0, 0) + bytes(22)
    if opcode == LOOKUP:
        return struct.pack("=QQQQII", 2, 0, 3600, 3600, 0, 0) + attr(2) if body == b"f\0" else -2
    if opcode == GETATTR:
        return struct.pack("=QII", 3600, 0, 0) + attr(node)
    if opcode == OPEN:
        return struct.pack("=QII", 1, 0, 0)
    if opcode == WRITE:
        _, offset, size, _, _, flags, _ = struct.unpack_from("=QQIIQII", body)
        print(f"offset {offset}, O_APPEND {bool(flags & os.O_APPEND)}", flush=True)
        return struct.pack("=II", size, 0)
    return b"" if opcode in (FLUSH, RELEASE) else -38


def serve(device):
    while True:
        try:
            message = os.read(device, 1 << 18)
        except OSError:
            return
        _, opcode, unique, node, *_ = HEADER.unpack_from(message)
        if opcode == 2:  # FORGET
            continue
        reply = reply_to(opcode, node, message[HEADER.size :])
        error, data = (reply, b"") if isinstance(reply, int) else (0, reply)
        os.write(device, OUT.pack(OUT.size + len(data), error, unique) + data)


device = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
subprocess.run(["mount", "-i", "-t", "fuse", "-o", options, "none", MNT], check=True, pass_fds=[device])
threading.Thread(target=serve, args=(device,), daemon=True).start()
program = f"""
import os
f = os.open({MNT + "/f"!r}, os.O_WRONLY | os.O_APPEND)
def write(what, fd, offset, flags):
    print(what, end=": ", flush=True)
    assert os.pwritev(fd, [b"x"], offset, flags) == 1
write("append", f, 0, 0)
write("RWF_NOAPPEND at 9", f, 9, {RWF_NOAPPEND})
write("append", f, 0, 0)
write("RWF_NOAPPEND at 0", f, 0, {RWF_NOAPPEND})
write("RWF_APPEND without O_APPEND", os.open({MNT + "/f"!r}, os.O_WRONLY), 0, {RWF_APPEND})
"""
subprocess.run([sys.executable, "-c", program], check=True, timeout=20)
END
timeout 60 python3 "$work/finding.py" "$work/mnt"
