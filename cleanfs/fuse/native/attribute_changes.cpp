#include "attribute_changes.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>

#include "attributes.hpp"
#include "inline_calls.hpp"

namespace cleanfs {

namespace {

// Of Linux 5.11: set-id bits must go with a truncation. The kernel says so of each change of owners, too.
constexpr std::uint32_t fattr_kill_suidgid = 1 << 11;

constexpr std::uint32_t owners = FATTR_UID | FATTR_GID, times = FATTR_ATIME | FATTR_MTIME;

// The changes that are made here, and what only says more about them.
constexpr std::uint32_t served = FATTR_MODE | owners | times | FATTR_ATIME_NOW | FATTR_MTIME_NOW | FATTR_CTIME | FATTR_FH | fattr_kill_suidgid;

timespec time_of(bool set, bool now, std::uint64_t seconds, std::uint32_t ns) {
    if (!set) return {0, UTIME_OMIT};
    if (now) return {0, UTIME_NOW};
    return {static_cast<time_t>(seconds), static_cast<long>(ns)};
}

// attributes.set_attributes. False if a call fails; a part may have been done.
bool set_attributes(int path_fd, const fuse_setattr_in& in) {
    char path[32];
    std::snprintf(path, sizeof path, "/proc/self/fd/%d", path_fd);
    if ((in.valid & owners) != 0) {
        const uid_t uid = (in.valid & FATTR_UID) != 0 ? in.uid : static_cast<uid_t>(-1);
        const gid_t gid = (in.valid & FATTR_GID) != 0 ? in.gid : static_cast<gid_t>(-1);
        if (chown(path, uid, gid) != 0) return false;
    }
    if ((in.valid & FATTR_MODE) != 0 && chmod(path, in.mode & 07777) != 0) return false;  // after what clears set-uid bits
    if ((in.valid & times) == 0) return true;
    const timespec both[] = {time_of(in.valid & FATTR_ATIME, in.valid & FATTR_ATIME_NOW, in.atime, in.atimensec),
                             time_of(in.valid & FATTR_MTIME, in.valid & FATTR_MTIME_NOW, in.mtime, in.mtimensec)};
    return utimensat(AT_FDCWD, path, both, 0) == 0;
}

}  // namespace

// Permissions.check_setattr: whether it names no open file, and its name may lead elsewhere.
bool AttributeChanges::may_be_by_stale_name(const InodeState& inode, const fuse_setattr_in& in, std::uint32_t thread) const {
    if (!caches_.shared || !inode.open_fds.empty() || (in.valid & (FATTR_MODE | owners)) == 0) return false;
    return inodes_.refused.contains(thread) || !metadata_.is_named(inode);
}

// Tree._check_own_change: whether nobody else has changed the file, of which stats were taken before and after.
bool AttributeChanges::is_as_expected(const InodeState& inode, const Stamps& before, const Stamps& after, bool moves_mtime) const {
    if (inode.record == nullptr || !caches_.shared) return true;
    return inode.record->stamps == before && after.size == before.size && (moves_mtime || after.mtime_ns == before.mtime_ns);
}

// CleanFS.set_attributes, by root, of which nothing is checked but the name.
bool AttributeChanges::set(const Message& message, Channel& channel) {
    const auto in = message.body_as<fuse_setattr_in>();
    if (!in || (in->valid & ~served) != 0 || (in->valid & (FATTR_MODE | owners | times)) == 0) return false;
    if (message.header().uid != 0) return false;
    InodeState* inode = metadata_.find_held(message.header().nodeid);
    if (inode == nullptr || (inode->kind != S_IFREG && inode->kind != S_IFDIR)) return false;
    FileState* file = inode->record;
    // The record of a file whose inode is new is found by its file handle.
    if (inode->kind == S_IFREG && (file == nullptr || file->forgotten || !file->stamps || file->mutations > 0)) return false;
    const SourceFsState* fs = inodes_.source_fs(*inode);
    const std::int64_t began = now_ns();
    if (fs == nullptr || !is_inline(*fs->names, began) || may_be_by_stale_name(*inode, *in, message.header().pid)) return false;

    struct stat st;
    if (fstat(inode->fd, &st) != 0) return false;
    const Stamps before = Stamps::of(st);
    if (!is_as_expected(*inode, before, before, true)) return false;
    const long sleeps = sleeps_of_thread();
    const bool done = set_attributes(inode->fd, *in) && fstat(inode->fd, &st) == 0;
    note_return(*fs->names, began, sleeps);
    const Stamps after = Stamps::of(st);
    if (!done || !is_as_expected(*inode, before, after, (in->valid & FATTR_MTIME) != 0)) return false;

    if (file != nullptr) {
        if (file->stamps != after) file->version = ++caches_.clock;
        file->stamps = after;
        file->racy = true;
        file->size = static_cast<std::uint64_t>(after.size);
    }
    fuse_attr_out out{};
    const Timeout timeout(inodes_.timeout_of(*inode));
    out.attr_valid = timeout.seconds;
    out.attr_valid_nsec = timeout.ns;
    out.attr = attributes_of(*inode, st);
    const auto told = inode->kernel->told();
    inode->kernel->reply_sent(st);
    inode->used = true;
    if (channel.reply(message.header().unique, 0, bytes_of(out)) == Sent::refused) {
        inodes_.change_refused(inodes_, inode->node, told);
        channel.let_scheduler_run();
    }
    return true;
}

}  // namespace cleanfs
