"""Run a module by a zygote: ``python -I -S zygote_call.py ADDRESS BELOW MODULE ARGUMENT...``.

The module gets the directory, the environment and the streams of this process, closed ones included.
It is killed when this process is killed.
"""

import json
import os
import socket
import sys


def main() -> int:
    """Run the module and return its status."""
    address, below, module, *arguments = sys.argv[1:]
    streams = [fd for fd in range(3) if _is_open(fd)]
    call = {
        "module": module,
        "patch": "",
        "arguments": arguments,
        "environment": dict(os.environ),
        "below": below,
        "streams": streams,
        "closed": [fd for fd in range(3) if fd not in streams],
    }
    directory = os.open(".", os.O_PATH)  # it may have been removed
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect("\0" + address)
        socket.send_fds(sock, [json.dumps(call).encode()], [*streams, directory])
        return int(sock.recv(16))


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
