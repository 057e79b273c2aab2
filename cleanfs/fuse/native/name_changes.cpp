#include "name_changes.hpp"

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "inline_calls.hpp"

namespace cleanfs {

namespace {

// namespace.lookup_here: open a name, on this file system. -1 and errno if that fails.
int open_here(int directory, const char* name) {
    open_how how{};
    how.flags = O_PATH | O_NOFOLLOW | O_CLOEXEC;
    how.resolve = RESOLVE_NO_XDEV;
    return static_cast<int>(syscall(SYS_openat2, directory, name, &how, sizeof how));
}

// Actor.is_daemon: nothing in the source depends on whether the requester acts, or the daemon for it.
bool is_daemon(const fuse_in_header& requester) { return requester.uid == geteuid() && requester.gid == getegid(); }

}  // namespace

// NameChanges.unlink in Python, of a file that the kernel knows. What fails is Python's to repeat, and to report.
bool NameChanges::unlink(const Message& message, Channel& channel) {
    InodeState* parent = metadata_.find_held(message.header().nodeid);
    const auto name = name_in(message.body());
    if (parent == nullptr || !name || !is_daemon(message.header())) return false;
    if (parent->node == InodeState::root_node && *name == inodes_.control_name) return false;
    const SourceFsState* fs = inodes_.source_fs(*parent);
    const std::int64_t began = now_ns();
    if (fs == nullptr || !is_inline(*fs->names, began)) return false;

    const long sleeps = sleeps_of_thread();
    const Descriptor held(open_here(parent->fd, name->data()));
    struct stat before, after;
    if (held.get() < 0 || fstat(held.get(), &before) != 0) return false;
    // Node ids on the first file system are inode numbers. A held descriptor keeps the number from other files.
    const InodeState* inode = inodes_.find(before.st_ino);
    if (inode == nullptr || inode->device != before.st_dev || inode->ino != before.st_ino || inode->fd < 0) return false;
    if (unlinkat(parent->fd, name->data(), 0) != 0) return false;
    const bool known = fstat(held.get(), &after) == 0;
    note_return(*fs->names, began, sleeps);

    parent->used = true;
    const InodeStates::Unlinked unlinked{parent->node, *name, inode->node, held.get(), before, known ? &after : nullptr};
    if (inodes_.unlinked(inodes_, unlinked)) channel.let_scheduler_run();
    if (channel.reply(message.header().unique, 0, {}) == Sent::refused) inodes_.unlink_refused(inodes_, unlinked);
    return true;
}

}  // namespace cleanfs
