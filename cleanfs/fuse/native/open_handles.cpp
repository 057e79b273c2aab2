#include "open_handles.hpp"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>

namespace cleanfs {

namespace {

// Flags of an open that changes something, or needs a second attempt where the source refuses them
// (namespace.open_advised).
constexpr std::uint32_t left_to_python = O_TRUNC | O_NOATIME | O_CREAT | O_EXCL;

// Flags that do not reach the source (handles.IO_FLAGS).
constexpr std::uint32_t not_for_source = O_NOCTTY | O_NOFOLLOW | O_DIRECT | O_APPEND;

// namespace.open_file, without a wait for another process's lease. -1 and errno if that fails.
int open_without_wait(int path_fd, std::uint32_t flags) {
    char path[32];
    std::snprintf(path, sizeof path, "/proc/self/fd/%d", path_fd);
    const int fd = open(path, static_cast<int>((flags & ~not_for_source) | O_NONBLOCK | O_CLOEXEC));
    if (fd >= 0 && (flags & O_NONBLOCK) == 0) {
        int off = 0;
        ioctl(fd, FIONBIO, &off);
    }
    return fd;
}

}  // namespace

OpenHandles::~OpenHandles() {
    for (const auto& [fh, handle] : handles_) ::close(handle.state.fd);
}

HandleState* OpenHandles::find(std::uint64_t fh) {
    const auto found = handles_.find(fh);
    return found == handles_.end() ? nullptr : &found->second.state;
}

// Whether pages or attributes that the kernel has may be stale, so that an open must see to it (Opener._compare,
// Opener._must_drop_pages).
bool OpenHandles::may_be_stale(const InodeState& inode) const {
    const KernelViewState& kernel = *inode.kernel;
    if (inodes_.invalidating.contains(inode.node) || kernel.dropped_for != 0) return true;
    return caches_.shared && (inode.record->racy || kernel.doubts_settled < kernel.doubts);
}

// CleanFS.open, of a file that has a record, and is as that says.
bool OpenHandles::open(const Message& message, Channel& channel) {
    const auto in = message.body_as<fuse_open_in>();
    if (!in || (in->flags & left_to_python) != 0) return false;
    if ((in->flags & O_ACCMODE) != O_RDONLY && inodes_.writeback) return false;  // it is opened for reading, too
    InodeState* inode = metadata_.find_held(message.header().nodeid);
    if (inode == nullptr || inode->kind != S_IFREG) return false;
    const FileState* file = inode->record;
    if (file == nullptr || file->forgotten || !file->stamps || may_be_stale(*inode)) return false;
    if (inodes_.source_fs(*inode) == nullptr || !has_room()) return false;
    if (caches_.shared && inodes_.refused.contains(message.header().pid)) return false;
    const bool calls_python = (in->flags & O_ACCMODE) != O_RDONLY || (caches_.shared && !inode->polled);
    if (calls_python && !metadata_.may_call_python) return false;

    Descriptor opened(open_without_wait(inode->fd, in->flags));
    struct stat st;
    if (opened.get() < 0 || fstat(opened.get(), &st) != 0) return false;
    const Stamps now = Stamps::of(st);
    KernelViewState& kernel = *inode->kernel;
    if (now != *file->stamps || kernel.sent != now) return false;
    if (caches_.shared && !metadata_.is_named(*inode)) return false;
    if (!may_access(*inode, st, message.header().uid)) return false;

    const std::uint64_t fh = add(*inode, opened.get(), in->flags);
    opened.release();
    if (message.header().uid != 0) kernel.access_ctime = now.ctime_ns;
    if (handles_.at(fh).writable()) inodes_.begin_writing(inodes_, inode->node, *inode->record);
    if (caches_.shared && !inode->polled && inodes_.poll(inodes_, inode->node)) channel.let_scheduler_run();

    const fuse_open_out out{fh, FOPEN_KEEP_CACHE, 0};
    if (channel.reply(message.header().unique, 0, {reinterpret_cast<const std::byte*>(&out), sizeof out}) == Sent::refused) close(fh, channel);
    return true;
}

std::uint64_t OpenHandles::add(InodeState& inode, int fd, std::uint32_t flags) {
    const SourceFsState* fs = inodes_.source_fs(inode);
    FileState* file = inode.record;
    inode.open_fds.reserve(inode.open_fds.size() + 1);
    Handle& handle = handles_[last_ + 1];  // what may throw comes before a count is changed
    handle.inode = &inode;
    handle.flags = flags;
    handle.state.file = file;
    handle.state.kernel = inode.kernel;
    handle.state.reads = fs->reads;
    handle.state.nowait = fs->nowait;
    handle.state.stream = &handle.stream;
    handle.state.writes = handle.writable() && (flags & (O_SYNC | O_DSYNC)) == 0 ? fs->writes : nullptr;
    handle.state.fd = fd;
    ++file->pins;
    ++file->handles;
    inode.open_fds.push_back(fd);
    ++inodes_.open_fds;
    file->used = inode.used = true;
    return ++last_;
}

// CleanFS.release, where nothing is left to be done but the close.
bool OpenHandles::release(const Message& message, Channel& channel) {
    const auto in = message.body_as<fuse_release_in>();
    const auto found = in ? handles_.find(in->fh) : handles_.end();
    if (found == handles_.end() || found->second.stream.rest()) return false;
    const bool calls_python = found->second.writable() || found->second.inode->nlookup <= 0;  // it may be forgotten
    if (calls_python && !metadata_.may_call_python) return false;
    struct stat st;
    if (fstat(found->second.state.fd, &st) != 0 || st.st_nlink == 0) return false;  // its pages go
    close(in->fh, channel);
    channel.reply(message.header().unique, 0, {});
    return true;
}

// FileHandle.release and InodeTable.closing.
void OpenHandles::close(std::uint64_t fh, Channel& channel) {
    const auto found = handles_.find(fh);
    const Handle& handle = found->second;
    InodeState& inode = *handle.inode;
    if (handle.writable()) inodes_.end_writing(inodes_, inode.node, *handle.state.file);
    --handle.state.file->pins;
    --handle.state.file->handles;
    std::erase(inode.open_fds, handle.state.fd);
    --inodes_.open_fds;
    ::close(handle.state.fd);
    handles_.erase(found);
    metadata_.drop_if_unused(inode, channel);
}

std::optional<OpenHandles::Adopted> OpenHandles::adopt(std::uint64_t fh) {
    const auto found = handles_.find(fh);
    if (found == handles_.end()) return std::nullopt;
    const Handle& handle = found->second;
    const Adopted adopted{handle.inode, handle.state.file, handle.state.fd, handle.flags,
                          handle.stream, handle.writable(), handle.state.nowait_tried_at};
    --adopted.file->pins;
    --adopted.file->handles;
    handles_.erase(found);
    return adopted;
}

std::vector<std::uint64_t> OpenHandles::writers() const {
    std::vector<std::uint64_t> nodes;
    for (const auto& [fh, handle] : handles_) {
        if (handle.writable()) nodes.push_back(handle.inode->node);
    }
    return nodes;
}

}  // namespace cleanfs
