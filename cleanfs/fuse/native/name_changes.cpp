#include "name_changes.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

#include "attributes.hpp"
#include "inline_calls.hpp"
#include "open_name.hpp"

namespace cleanfs {

namespace {

// Actor.is_daemon: nothing in the source depends on whether the requester acts, or the daemon for it.
bool is_daemon(const fuse_in_header& requester) { return requester.uid == geteuid() && requester.gid == getegid(); }

// Whether a directory has a default ACL, which sets the permissions of what is made in it; none if that is not known.
std::optional<bool> has_default_acl(int directory) {
    char path[32];
    std::snprintf(path, sizeof path, "/proc/self/fd/%d", directory);
    const ssize_t size = getxattr(path, "system.posix_acl_default", nullptr, 0);
    if (size >= 0) return size > 0;
    if (errno == ENODATA || errno == EOPNOTSUPP) return false;
    return std::nullopt;
}

// Open a file once more, by its path alone.
int open_path(int fd) {
    char path[32];
    std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return open(path, O_PATH | O_CLOEXEC);
}

}  // namespace

// NameChanges.changing in Python, by a requester for whom the main thread can act.
std::optional<NameChanges::Place> NameChanges::find_place(const Message& message, Bytes bytes, std::int64_t now) {
    InodeState* parent = metadata_.find_held(message.header().nodeid);
    const auto name = name_in(bytes);
    if (parent == nullptr || !name || !is_daemon(message.header())) return std::nullopt;
    if (parent->node == InodeState::root_node && *name == inodes_.control_name) return std::nullopt;
    const SourceFsState* fs = inodes_.source_fs(*parent);
    if (fs == nullptr || !is_inline(*fs->names, now)) return std::nullopt;
    return Place{parent, *name, fs->names};
}

// CleanFS.create, of a file that becomes the requester's when it is made. What fails is Python's to repeat.
bool NameChanges::create(const Message& message, Channel& channel) {
    const auto in = message.body_as<fuse_create_in>();
    const std::int64_t began = now_ns();
    const auto place = in ? find_place(message, message.body().subspan(sizeof *in), began) : std::nullopt;
    if (!place || !inodes_.can_act || inodes_.writeback || !handles_.has_room()) return false;
    if (inodes_.by_node.size() > inodes_.max_inodes) return false;
    mode_t mode = in->mode & 07777;
    if ((mode & (S_ISUID | S_ISGID | S_ISVTX)) != 0) return false;
    const int directory = place->parent->fd;
    if ((mode & in->umask & 0777) != 0) {
        const auto has_acl = has_default_acl(directory);
        if (!has_acl) return false;
        if (!*has_acl) mode &= ~in->umask;
    }

    const long sleeps = sleeps_of_thread();
    const std::uint32_t flags = in->flags & ~std::uint32_t{O_NOCTTY | O_DIRECT | O_APPEND};
    Descriptor file(openat(directory, place->name.data(), static_cast<int>(flags | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC), mode));
    if (file.get() < 0) return false;
    note_return(*place->policy, began, sleeps);
    Descriptor path(open_path(file.get()));
    struct stat st;
    if (path.get() < 0 || fstat(file.get(), &st) != 0) {
        unlinkat(directory, place->name.data(), 0);
        return false;
    }

    place->parent->used = true;
    const bool writable = (in->flags & O_ACCMODE) != O_RDONLY;
    const int path_fd = path.get();
    path.release();
    const auto [inode, task_ready] = inodes_.created(inodes_, {place->parent->node, place->name, file.get(), path_fd, writable});
    if (task_ready) channel.let_scheduler_run();
    if (inode == nullptr) {
        channel.reply(message.header().unique, -EIO, {});
        return true;
    }
    struct {
        fuse_entry_out entry;
        fuse_open_out open;
    } out{};
    out.entry = entry_of(*inode, st, inodes_);
    inode->kernel->reply_sent(st);
    out.open.fh = handles_.add(*inode, file.get(), in->flags);
    out.open.open_flags = FOPEN_KEEP_CACHE;  // it has no pages of a file of which no reply has told it
    file.release();
    if (channel.reply(message.header().unique, 0, {reinterpret_cast<const std::byte*>(&out), sizeof out}) == Sent::refused) {
        inodes_.create_refused(inodes_, inode->node);
        channel.let_scheduler_run();
        handles_.close(out.open.fh, channel);
    }
    return true;
}

// NameChanges.unlink in Python, of a file that the kernel knows. What fails is Python's to repeat, and to report.
bool NameChanges::unlink(const Message& message, Channel& channel) {
    const std::int64_t began = now_ns();
    const auto place = find_place(message, message.body(), began);
    if (!place) return false;
    InodeState* parent = place->parent;

    const long sleeps = sleeps_of_thread();
    const Descriptor held(open_here(parent->fd, place->name.data()));
    struct stat before, after;
    if (held.get() < 0 || fstat(held.get(), &before) != 0) return false;
    // Node ids on the first file system are inode numbers. A held descriptor keeps the number from other files.
    const InodeState* inode = inodes_.find(before.st_ino);
    if (inode == nullptr || inode->device != before.st_dev || inode->ino != before.st_ino || inode->fd < 0) return false;
    if (unlinkat(parent->fd, place->name.data(), 0) != 0) return false;
    const bool known = fstat(held.get(), &after) == 0;
    note_return(*place->policy, began, sleeps);

    parent->used = true;
    const InodeStates::Unlinked unlinked{parent->node, place->name, inode->node, held.get(), before, known ? &after : nullptr};
    if (inodes_.unlinked(inodes_, unlinked)) channel.let_scheduler_run();
    if (channel.reply(message.header().unique, 0, {}) == Sent::refused) {
        inodes_.unlink_refused(inodes_, unlinked);
        channel.let_scheduler_run();
    }
    return true;
}

}  // namespace cleanfs
