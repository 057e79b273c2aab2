"""Notify a supervisor (sd_notify(3))."""

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify_ready() -> None:
    """Tell a supervisor that started us with Type=notify that we are ready."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.connect("\0" + address[1:] if address.startswith("@") else address)
                sock.send(b"READY=1")
        except OSError as exc:  # an inherited address of another supervisor is no reason not to serve
            log.warning("cannot tell %r that the mount is ready: %s", address, exc)
