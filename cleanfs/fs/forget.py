"""Take back references that the kernel gives up, without a task of pyfuse3 for each message."""

from collections.abc import Iterator

from cleanfs.fuse.channel import Channel
from cleanfs.fuse.protocol import (
    FUSE_BATCH_FORGET,
    FUSE_BATCH_FORGET_IN,
    FUSE_FORGET,
    FUSE_FORGET_IN,
    FUSE_FORGET_ONE,
)
from cleanfs.fuse.request import Request
from cleanfs.vfs.inodes import InodeTable


def add_handlers(channel: Channel, inodes: InodeTable) -> None:
    """Have the channel's FORGETs handled here. They have no reply, and the channel checks lengths."""

    def forget(request: Request, body: bytes) -> None:
        [nlookup] = FUSE_FORGET_IN.unpack_from(body)
        inodes.forget(request.nodeid, nlookup)

    def forget_batch(_: Request, body: bytes) -> None:
        for node, nlookup in forgets_in(body):
            inodes.forget(node, nlookup)

    channel.handlers[FUSE_FORGET] = forget
    channel.handlers[FUSE_BATCH_FORGET] = forget_batch


def forgets_in(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield the (node, nlookup) pairs of a FUSE_BATCH_FORGET."""
    count, _ = FUSE_BATCH_FORGET_IN.unpack_from(body)
    begin = FUSE_BATCH_FORGET_IN.size
    yield from FUSE_FORGET_ONE.iter_unpack(body[begin : begin + count * FUSE_FORGET_ONE.size])
