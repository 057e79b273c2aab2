"""Make handles of directories that the channel has opened and checked."""

from cleanfs.fs.handle_table import HandleTable
from cleanfs.vfs.handles import DirHandle, Services
from cleanfs.vfs.inodes import InodeTable


class OpenDirectories:
    """Opens directories of a local source for the channel."""

    def __init__(self, services: Services, inodes: InodeTable, handles: HandleTable) -> None:
        """Add the handles to ``handles``."""
        self._services = services
        self._inodes = inodes
        self._handles = handles

    def open(self, node: int, fd: int) -> int:
        """Make a handle of a directory; 0 if another would leave no fd for anything else."""
        if not self._inodes.may_open():
            return 0
        handles = self._inodes.exports
        directory = DirHandle(self._services, self._inodes[node], fd, handles=handles)
        return self._handles.add_directory(directory)
