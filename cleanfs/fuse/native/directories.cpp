#include "directories.hpp"

#include <fcntl.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <iterator>
#include <ranges>
#include <utility>

#include "attributes.hpp"
#include "open_name.hpp"
#include "file_handles.hpp"
#include "inline_calls.hpp"

namespace cleanfs {

namespace {

// More is left to a thread, as it would hold up other requests: what takes some milliseconds from memory. glibc requests
// 32 KiB of entries.
constexpr std::size_t max_reply = std::size_t{128} << 10, max_names = 8192, names_buffer_size = std::size_t{64} << 10;

// The timeouts of "." and "..", as pyfuse3 has them. The kernel does not look at them.
constexpr std::uint64_t dot_timeout = 300;

constexpr std::string_view dots[] = {".", ".."};

// struct linux_dirent64 (getdents(2)), which is in no header.
struct Dirent {
    std::uint64_t ino;
    std::int64_t off;
    unsigned short length;
    unsigned char type;
    char name[];
};

bool is_dot(std::string_view name) { return name == dots[0] || name == dots[1]; }

// namespace.lookup_cached: open and stat a name without a wait, on this file system. False and errno if that fails.
bool stat_cached(int directory, const char* name, Descriptor& found, struct stat& st) {
    found.reset(open_cached(directory, name));
    return found.get() >= 0 && fstat(found.get(), &st) == 0;
}

}  // namespace

bool Directories::serve(const Message& message, Channel& channel) {
    switch (message.header().opcode) {
        case FUSE_OPENDIR: return open(message, channel);
        case FUSE_READDIRPLUS: return list(message, channel);
        case FUSE_RELEASEDIR: return close(message, channel);
        case FUSE_STATFS: return report_space(message, channel);
        default: return false;
    }
}

DirectoryState* Directories::find(std::uint64_t fh) const {
    const auto found = directories_.find(fh);
    return found == directories_.end() ? nullptr : found->second;
}

// CleanFS.opendir: Permissions.check_opened, where it finds nothing.
bool Directories::open(const Message& message, Channel& channel) {
    const auto in = message.body_as<fuse_open_in>();
    InodeState* inode = metadata_.find_held(message.header().nodeid);
    if (!in || inode == nullptr) return false;
    if (inodes_.refused.contains(message.header().pid)) return false;
    const bool is_root = inode->node == InodeState::root_node;
    if (!is_root && !inodes_.caches_absence && !metadata_.is_named(*inode)) return false;  // with --coherency none no name moves

    const auto advice = static_cast<int>(in->flags & O_NOATIME);
    Descriptor fd(openat(inode->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC | advice));
    struct stat st;
    if (fd.get() < 0 || fstat(fd.get(), &st) != 0) return false;
    if (!may_access(*inode, st, message.header().uid)) return false;
    if (message.header().uid != 0) inode->kernel->access_ctime = Stamps::of(st).ctime_ns;
    inode->used = true;
    const std::uint64_t fh = inodes_.open_directory(inodes_, inode->node, fd.get());
    if (fh == 0) return false;
    fd.release();
    fuse_open_out out{};
    out.fh = fh;
    if (channel.reply(message.header().unique, 0, bytes_of(out)) == Sent::refused) inodes_.close_directory(inodes_, fh);
    return true;
}

// CleanFS.releasedir, of a directory that no other request uses.
bool Directories::close(const Message& message, Channel& channel) {
    const auto in = message.body_as<fuse_release_in>();
    if (!in || find(in->fh) == nullptr || !inodes_.close_directory(inodes_, in->fh)) return false;
    channel.reply(message.header().unique, 0, {});
    return true;
}

// CleanFS.readdir.
bool Directories::list(const Message& message, Channel& channel) {
    const auto in = message.body_as<fuse_read_in>();
    DirectoryState* directory = in ? find(in->fh) : nullptr;
    const InodeState* inode = inodes_.find(message.header().nodeid);
    if (directory == nullptr || directory->rewinding > 0 || in->size > max_reply) return false;
    if (inode == nullptr || inode->device != inodes_.device()) return false;
    const SourceFsState* fs = inodes_.source_fs(*inode);
    if (fs == nullptr) return false;
    std::shared_ptr<const Names> names = in->offset == 0 ? read_names(directory->fd, *fs->listings) : directory->names;
    if (names == nullptr) return false;
    reply_size_ = in->size;
    if (!fill(directory->fd, *inode, *names, in->offset)) return false;
    metadata_.reserve_unused(entries_.size());  // what may throw comes before a count is changed
    if (!enter(*inode)) return false;
    directory->names = std::move(names);
    tell();
    if (channel.reply(message.header().unique, 0, Bytes(reply_)) == Sent::refused) take_back(channel);
    metadata_.keep_bounded(channel);
    return true;
}

// A snapshot of all names but the dots. Null if that may wait, or fails, or there are many. The directory is at its
// beginning before and after that, as os.listdir() leaves it, and expects it.
std::shared_ptr<const Names> Directories::read_names(int fd, InlineState& policy) {
    const std::int64_t began = now_ns();
    if (!is_inline(policy, began)) return nullptr;
    const long sleeps = sleeps_of_thread();
    auto names = std::make_shared<Names>();
    names_buffer_.resize(names_buffer_size);
    long size;
    do {
        size = syscall(SYS_getdents64, fd, names_buffer_.data(), names_buffer_.size());
        for (long at = 0; at < size;) {
            const auto* entry = reinterpret_cast<const Dirent*>(names_buffer_.data() + at);
            if (!is_dot(entry->name)) names->push_back(entry->name);
            at += entry->length;
        }
    } while (size > 0 && names->size() <= max_names);
    note_return(policy, began, sleeps);
    if (lseek(fd, 0, SEEK_SET) != 0 || size < 0 || names->size() > max_names) return nullptr;
    names->shrink_to_fit();
    return names;
}

// Lister.fill, of the entries from a position on. False if Python must.
bool Directories::fill(int fd, const InodeState& directory, const Names& names, std::uint64_t offset) {
    reply_.clear();
    reply_.reserve(reply_size_);
    entries_.clear();
    found_.clear();
    entered_.clear();
    Added added = add_dots(fd, directory, offset);
    for (std::uint64_t at = offset < std::size(dots) ? 0 : offset - std::size(dots); added == Added::yes && at < names.size(); ++at) {
        added = add_name(fd, directory, names, at);
    }
    return added != Added::for_python;
}

// Lister._add_dots, Entries.dot. On the first file system an inode is shown with its own number.
Directories::Added Directories::add_dots(int fd, const InodeState& directory, std::uint64_t offset) {
    const bool is_root = directory.node == InodeState::root_node;
    for (std::uint64_t at = offset; at < std::size(dots); ++at) {
        Descriptor parent;
        struct stat st;
        const bool has_stat = is_root || at == 0 ? fstat(fd, &st) == 0 : stat_cached(fd, "..", parent, st);
        if (!has_stat || st.st_dev != directory.device) return Added::for_python;
        const InodeState* known = at == 0 ? &directory : directory.parent;
        const bool is_numbered = known == nullptr || known->node == InodeState::root_node || known->ino != st.st_ino || known->node == st.st_ino;
        if (!is_numbered) return Added::for_python;
        if (!append(dots[at], st, at + 1)) return Added::no_space;
    }
    return Added::yes;
}

// Lister._add_inode: InodeTable.listed and InodeTable.referenced, Tree.observe.
Directories::Added Directories::add_name(int fd, const InodeState& directory, const Names& names, std::size_t position) {
    const std::string_view name = names[position];
    if (directory.node == InodeState::root_node && name == inodes_.control_name) return Added::yes;
    Descriptor file;
    struct stat st;
    if (!stat_cached(fd, name.data(), file, st)) return errno == ENOENT ? Added::yes : Added::for_python;
    if (st.st_dev != directory.device) return Added::for_python;
    InodeState* inode = inodes_.find(st.st_ino);
    const std::size_t place = reply_.size();
    if (inode != nullptr) {
        if (!inode->current || inode->ino != st.st_ino || inode->device != st.st_dev) return Added::for_python;
        if (inode->fd < 0 && inode->kind != (st.st_mode & S_IFMT)) return Added::for_python;  // the number was given again
        if (!metadata_.is_as_known(*inode, st)) return Added::for_python;
    } else if (inodes_.invalidating.contains(st.st_ino)) {  // of another file that had this number
        return Added::for_python;
    }
    if (!append(name, st, position + std::size(dots) + 1)) return Added::no_space;
    entries_.push_back({place, st, inode, {}});
    const bool is_in_place = inode != nullptr && inode->parent == &directory && inode->name == name;
    const bool has_names = st.st_nlink > 1 && !S_ISDIR(st.st_mode);  // of which the last one in the reply counts
    if (is_in_place && !has_names) return Added::yes;
    // A name that it left would have to be invalidated in the kernel (InodeTable.on_leave).
    if (inode != nullptr && inode->parent != nullptr && st.st_nlink == 1) return Added::for_python;
    entered_.push_back(entries_.size() - 1);
    found_.push_back({name, st, inode == nullptr && inodes_.wants_handles ? handle_of(file.get()) : std::nullopt});
    return Added::yes;
}

// Add an entry to the reply, with all but what its inode says. False if it does not fit.
bool Directories::append(std::string_view name, const struct stat& st, std::uint64_t next) {
    const std::size_t length = offsetof(fuse_direntplus, dirent) + offsetof(fuse_dirent, name) + name.size();
    const std::size_t padded = FUSE_DIRENT_ALIGN(length), place = reply_.size();
    if (place + padded > reply_size_) return false;
    fuse_direntplus entry{};
    entry.entry_out.nodeid = st.st_ino;
    entry.entry_out.entry_valid = entry.entry_out.attr_valid = dot_timeout;
    entry.entry_out.attr = attributes_of(st.st_ino, st);
    entry.dirent.ino = st.st_ino;
    entry.dirent.off = next;
    entry.dirent.namelen = static_cast<std::uint32_t>(name.size());
    entry.dirent.type = (st.st_mode & S_IFMT) >> 12;
    reply_.resize(place + padded);
    std::memcpy(reply_.data() + place, &entry, offsetof(fuse_direntplus, dirent) + offsetof(fuse_dirent, name));
    std::memcpy(reply_.data() + place + length - name.size(), name.data(), name.size());
    return true;
}

// Have Python make the inodes that are new, and move those that were found elsewhere. False if nothing was done.
bool Directories::enter(const InodeState& directory) {
    if (found_.empty()) return true;
    nodes_.resize(found_.size());
    if (!inodes_.enter_listed(inodes_, directory.node, found_, nodes_.data())) return false;
    for (std::size_t at = 0; at < nodes_.size(); ++at) entries_[entered_[at]].inode = inodes_.find(nodes_[at]);
    return true;
}

// Record what the reply tells, and complete it. The kernel gets one more reference to each inode.
void Directories::tell() {
    for (Entry& entry : entries_) {
        InodeState& inode = *entry.inode;
        entry.told = inode.kernel->told();
        inode.kernel->reply_sent(entry.st);
        ++inode.nlookup;
        const fuse_entry_out out = entry_of(inode, entry.st, inodes_);
        std::byte* const to = reply_.data() + entry.place;
        std::memcpy(to + offsetof(fuse_direntplus, entry_out), &out, sizeof out);
        std::memcpy(to + offsetof(fuse_direntplus, dirent) + offsetof(fuse_dirent, ino), &out.attr.ino, sizeof out.attr.ino);
    }
}

// ReplyRollback.listed: the first of two names of a file has the oldest.
void Directories::take_back(Channel& channel) {
    for (const Entry& entry : std::views::reverse(entries_)) {
        entry.inode->kernel->rollback(entry.told);
        metadata_.take_back(entry.inode->node, 1);
    }
    metadata_.drop_unused(channel);
}

// CleanFS.statfs, of a local source.
bool Directories::report_space(const Message& message, Channel& channel) {
    const InodeState* root = inodes_.find(InodeState::root_node);
    struct statvfs space;
    if (!root->is_ready() || fstatvfs(root->fd, &space) != 0) return false;
    fuse_statfs_out out{};
    out.st.blocks = space.f_blocks;
    out.st.bfree = space.f_bfree;
    out.st.bavail = space.f_bavail;
    out.st.files = space.f_files;
    out.st.ffree = space.f_ffree;
    out.st.bsize = static_cast<std::uint32_t>(space.f_bsize);
    out.st.namelen = static_cast<std::uint32_t>(space.f_namemax);
    out.st.frsize = static_cast<std::uint32_t>(space.f_frsize);
    channel.reply(message.header().unique, 0, bytes_of(out));
    return true;
}

}  // namespace cleanfs
