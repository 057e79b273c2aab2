#include "metadata.hpp"

#include <fcntl.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string_view>

#include "attributes.hpp"
#include "file_handles.hpp"
#include "inline_calls.hpp"
#include "open_name.hpp"

namespace cleanfs {

namespace {

// What Python makes of a count that no kernel sends: it stays far below zero.
constexpr std::uint64_t max_nlookup = std::uint64_t{1} << 62;

constexpr std::string_view capability = "security.capability", access_acl = "system.posix_acl_access", default_acl = "system.posix_acl_default";

bool is_dot(std::string_view name) { return name == "." || name == ".."; }

}  // namespace

std::optional<std::string_view> name_in(Bytes bytes) {
    const auto name = string_in(bytes);
    if (!name || name->empty() || *name == "." || *name == ".." || name->find('/') != name->npos) return std::nullopt;
    return name;
}

bool Metadata::serve(const Message& message, Channel& channel) {
    switch (message.header().opcode) {
        case FUSE_GETATTR: return get_attributes(message, channel);
        case FUSE_LOOKUP: return look_up(message, channel);
        case FUSE_READLINK: return read_link(message, channel);
        case FUSE_GETXATTR: return get_xattr(message, channel);
        case FUSE_FORGET: return forget(message, channel);
        case FUSE_BATCH_FORGET: return forget_batch(message, channel);
        default: return false;
    }
}

bool Metadata::may_serve_beside(const Message& message) {
    switch (message.header().opcode) {
        case FUSE_GETATTR:
        case FUSE_LOOKUP:
        case FUSE_READLINK:
        case FUSE_GETXATTR:
            return true;
        default:
            return false;
    }
}

InodeState* Metadata::find_held(std::uint64_t node) {
    InodeState* inode = inodes_.find(node);
    if (inode == nullptr || inode->is_ready()) return inode;
    const InodeState* parent = inode->parent;
    if (!inode->is_parked() || parent == nullptr || !parent->is_ready() || parent->nlookup <= 0) return nullptr;
    Descriptor found(open_cached(parent->fd, inode->name.c_str()));
    struct stat st;
    if (found.get() < 0 || fstat(found.get(), &st) != 0 || !hold(*inode, found, st)) return nullptr;
    return inode;
}

// Have a parked inode keep a descriptor that may be of it (parking.is_parked).
bool Metadata::hold(InodeState& inode, Descriptor& found, const struct stat& st) {
    if (inode.device != st.st_dev || inode.ino != st.st_ino || inode.kind != (st.st_mode & S_IFMT)) return false;
    if (!may_call_python || !inodes_.hold(inodes_, inode.node, found.get())) return false;
    found.release();
    return inode.is_ready();  // the table may have parked it again
}

bool Metadata::is_as_known(const InodeState& inode, const struct stat& st) const {
    if (inodes_.invalidating.contains(inode.node)) return false;
    return inode.record == nullptr || inode.record->forgotten || inode.record->stamps == Stamps::of(st);
}

bool Metadata::is_named(const InodeState& inode) const {
    InodeState* parent = inode.parent;
    if (parent == nullptr || parent->nlookup <= 0 || !parent->is_ready() || parent->device != inode.device) return false;
    struct statx found;
    const int flags = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC;
    if (statx(parent->fd, inode.name.c_str(), flags, STATX_INO, &found) != 0) return false;
    parent->used = true;
    return makedev(found.stx_dev_major, found.stx_dev_minor) == inode.device && found.stx_ino == inode.ino;
}

bool may_access(const InodeState& inode, const struct stat& st, std::uint32_t uid) {
    const KernelViewState& kernel = *inode.kernel;
    if (uid == 0 || kernel.access == KernelViewState::not_told) return true;
    return kernel.access == KernelViewState::access_of(st) && kernel.access_ctime == Stamps::of(st).ctime_ns;
}

// CleanFS.getattr.
bool Metadata::get_attributes(const Message& message, Channel& channel) {
    InodeState* inode = find_held(message.header().nodeid);
    if (inode == nullptr) return false;
    struct stat st;
    if (fstat(inode->fd, &st) != 0 || st.st_nlink == 0 || !is_as_known(*inode, st)) return false;
    KernelViewState& kernel = *inode->kernel;
    // An open file's size must be settled before a read goes by it (Tree._settle_size).
    if (!inode->open_fds.empty() && (kernel.size_doubt > kernel.doubts_settled || kernel.sent != Stamps::of(st))) return false;

    fuse_attr_out out{};
    const Timeout timeout(inodes_.timeout_of(*inode));
    out.attr_valid = timeout.seconds;
    out.attr_valid_nsec = timeout.ns;
    out.attr = attributes_of(*inode, st);
    const auto before = kernel.told();
    kernel.reply_sent(st);
    inode->used = true;
    if (channel.reply(message.header().unique, 0, bytes_of(out)) == Sent::refused) kernel.rollback(before);
    return true;
}

// Open a name in a directory: from the dentry cache, or by a call that may wait, where those do not (Tree.look_up). -1 and
// errno if that fails.
int Metadata::find_name(const InodeState& directory, const char* name) const {
    const int cached = open_cached(directory.fd, name);
    const SourceFsState* fs = inodes_.source_fs(directory);
    if (cached >= 0 || errno != EAGAIN || fs == nullptr) return cached;
    const std::int64_t began = now_ns();
    if (!is_inline(*fs->lookups, began)) return errno = EAGAIN, -1;
    const long sleeps = sleeps_of_thread();
    const int found = open_here(directory.fd, name);
    const int error = errno;
    note_return(*fs->lookups, began, sleeps);
    return errno = error, found;
}

// CleanFS.lookup.
bool Metadata::look_up(const Message& message, Channel& channel) {
    InodeState* parent = find_held(message.header().nodeid);
    const auto name = string_in(message.body());
    if (parent == nullptr || !name || name->empty()) return false;
    if (name->find('/') != name->npos || (parent->node == InodeState::root_node && *name == inodes_.control_name)) return false;
    if (inodes_.refused.contains(message.header().pid)) return false;
    if (!may_call_python && inodes_.by_node.size() > inodes_.max_inodes) return false;

    Descriptor found(find_name(*parent, name->data()));
    if (found.get() < 0) {
        if (errno != ENOENT) return false;
        parent->used = true;
        return look_up_absent(message, channel);
    }
    struct stat st;
    if (fstat(found.get(), &st) != 0) return false;
    parent->used = true;
    reserve_unused(1);  // what may throw comes before a count is changed
    // Node ids on the first file system are inode numbers. A held descriptor keeps the number from other files.
    InodeState* inode = inodes_.find(st.st_ino);
    return inode == nullptr ? reply_new(message, channel, *parent, *name, found, st)
                            : reply_known(message, channel, *inode, *parent, *name, found, st);
}

// CleanFS.lookup, of a name by which the kernel found the same inode last.
bool Metadata::reply_known(const Message& message, Channel& channel, InodeState& inode, const InodeState& parent,
                           std::string_view name, Descriptor& found, const struct stat& st) {
    if (inode.device != st.st_dev || inode.ino != st.st_ino) return false;
    // "." and ".." are no names by which an inode was found.
    if (inode.parent != &parent || inode.name != name || !is_as_known(inode, st)) return false;
    if (inode.is_parked() ? !hold(inode, found, st) : !inode.is_ready()) return false;
    inode.used = true;
    reply_entry(message, channel, inode, st);
    return true;
}

// CleanFS.lookup, of a file that the kernel does not know.
bool Metadata::reply_new(const Message& message, Channel& channel, const InodeState& parent, std::string_view name,
                         Descriptor& found, const struct stat& st) {
    if (!may_call_python || st.st_dev != inodes_.device() || is_dot(name)) return false;
    if (inodes_.invalidating.contains(st.st_ino)) return false;  // of another file that had this number
    const std::optional<std::string> handle = inodes_.wants_handles ? handle_of(found.get()) : std::nullopt;
    const std::uint64_t node = inodes_.enter(inodes_, parent.node, {name, st, handle}, found.get());
    if (node == 0) return false;
    found.release();
    InodeState* inode = inodes_.find(node);
    reply_entry(message, channel, *inode, st);
    return true;
}

// Reply with an inode, to which the kernel gets one more reference.
void Metadata::reply_entry(const Message& message, Channel& channel, InodeState& inode, const struct stat& st) {
    const fuse_entry_out out = entry_of(inode, st, inodes_);
    KernelViewState& kernel = *inode.kernel;
    const auto before = kernel.told();
    kernel.reply_sent(st);
    ++inode.nlookup;
    if (channel.reply(message.header().unique, 0, bytes_of(out)) == Sent::refused) {
        kernel.rollback(before);
        take_back(inode.node, 1);
        drop_unused(channel);
    }
    keep_bounded(channel);
}

void Metadata::keep_bounded(Channel& channel) {
    if (inodes_.by_node.size() > inodes_.max_inodes && inodes_.ask_to_forget(inodes_)) channel.let_scheduler_run();
}

// There is no such name. With --coherency none the kernel may remember that (Entries.absent).
bool Metadata::look_up_absent(const Message& message, Channel& channel) const {
    if (!inodes_.caches_absence) {
        channel.reply(message.header().unique, -ENOENT, {});
        return true;
    }
    fuse_entry_out out{};
    const Timeout timeout(inodes_.timeout);
    out.entry_valid = timeout.seconds;
    out.entry_valid_nsec = timeout.ns;
    channel.reply(message.header().unique, 0, bytes_of(out));
    return true;
}

// CleanFS.readlink.
bool Metadata::read_link(const Message& message, Channel& channel) {
    InodeState* inode = find_held(message.header().nodeid);
    if (inode == nullptr) return false;
    buffer_.resize(PATH_MAX);
    const ssize_t length = readlinkat(inode->fd, "", reinterpret_cast<char*>(buffer_.data()), buffer_.size());
    if (length <= 0 || static_cast<std::size_t>(length) >= buffer_.size()) return false;
    inode->used = true;
    channel.reply(message.header().unique, 0, Bytes(buffer_).first(static_cast<std::size_t>(length)));
    return true;
}

// CleanFS.getxattr, of an attribute that is not there.
bool Metadata::get_xattr(const Message& message, Channel& channel) {
    if (message.body().size() < sizeof(fuse_getxattr_in)) return false;
    const auto name = string_in(message.body().subspan(sizeof(fuse_getxattr_in)));
    if (!name) return false;
    const InodeState* known = inodes_.find(message.header().nodeid);
    if (*name == capability && known != nullptr && known->local && !known->open_fds.empty()) {  // Xattrs.capability
        if (fgetxattr(known->open_fds.back(), name->data(), nullptr, 0) != -1 || errno != ENODATA) return false;
        channel.reply(message.header().unique, -ENODATA, {});
        return true;
    }
    InodeState* inode = find_held(message.header().nodeid);
    if (inode == nullptr) return false;
    const bool is_acl = *name == access_acl || *name == default_acl;
    if (*name == access_acl && !inode->kernel->acl.empty()) return false;  // it may have been removed
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", inode->fd);
    if (getxattr(path, name->data(), nullptr, 0) != -1) return false;
    if (errno != ENODATA && !(is_acl && errno == EOPNOTSUPP)) return false;
    inode->used = true;
    channel.reply(message.header().unique, -ENODATA, {});
    return true;
}

bool Metadata::forget(const Message& message, Channel& channel) {
    const auto in = message.body_as<fuse_forget_in>();
    if (!in) return false;
    unused_.reserve(1);
    take_back(message.header().nodeid, in->nlookup);
    drop_unused(channel);
    return true;
}

bool Metadata::forget_batch(const Message& message, Channel& channel) {
    const auto in = message.body_as<fuse_batch_forget_in>();
    if (!in) return false;
    Bytes rest = message.body().subspan(sizeof *in);
    if (rest.size() / sizeof(fuse_forget_one) < in->count) return false;
    unused_.reserve(in->count);  // what may throw comes before a count is changed
    for (std::uint32_t at = 0; at < in->count; ++at) {
        fuse_forget_one one;
        std::memcpy(&one, rest.data(), sizeof one);
        rest = rest.subspan(sizeof one);
        take_back(one.nodeid, one.nlookup);
    }
    drop_unused(channel);
    return true;
}

void Metadata::take_back(std::uint64_t node, std::uint64_t nlookup) {
    InodeState* inode = inodes_.find(node);
    if (inode == nullptr || node == InodeState::root_node) return;
    inode->nlookup -= static_cast<std::int64_t>(std::min(nlookup, max_nlookup));
    inode->nlookup = std::max(inode->nlookup, -static_cast<std::int64_t>(max_nlookup));
    if (inode->nlookup <= 0) unused_.push_back(node);
}

void Metadata::drop_if_unused(const InodeState& inode, Channel& channel) {
    if (inode.nlookup > 0 || !inode.open_fds.empty()) return;
    unused_.push_back(inode.node);
    drop_unused(channel);
}

void Metadata::drop_unused(Channel& channel) {
    if (unused_.empty()) return;
    if (inodes_.drop_unused(inodes_, unused_)) channel.let_scheduler_run();
    unused_.clear();
}

}  // namespace cleanfs
