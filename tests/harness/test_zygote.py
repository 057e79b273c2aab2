"""Test that a command run by the zygote behaves like the program itself."""

import socket
import subprocess
from pathlib import Path

from tests.harness.mounting import wait_until
from tests.harness.zygote import zygote


def test_a_command_has_its_own_streams_directory_and_environment(tmp_path: Path) -> None:
    code = (
        "import sys\nprint(os.getcwd(), os.environ['ONE'], sys.stdin)\n"
        "print('error', file=sys.stderr)\nsys.exit(7)"
    )
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *zygote().command(f"import os\n{code}", module="code")],
        cwd=tmp_path,
        env={"ONE": "1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stdout == f"{tmp_path} 1 None\n"
    assert (done.returncode, done.stderr) == (7, "error\n")


def test_a_command_that_is_killed_ends_its_process() -> None:
    code = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    command = zygote().command(code, module="code")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_caller_that_says_nothing_ends_no_process() -> None:
    address = zygote().command()[4]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect("\0" + address)
    command = zygote().command("print(1)", module="code")
    assert subprocess.run(command, capture_output=True, timeout=30, check=True).stdout == b"1\n"
