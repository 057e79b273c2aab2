// Names and attributes of the source, as requests and replies carry them.
#pragma once

#include <linux/fuse.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>

#include "channel.hpp"
#include "inode_state.hpp"

namespace cleanfs {

// A descriptor that is closed unless it is released.
class Descriptor {
public:
    Descriptor() = default;
    explicit Descriptor(int fd) : fd_(fd) {}
    ~Descriptor() { reset(-1); }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;

    int get() const { return fd_; }
    void release() { fd_ = -1; }
    void reset(int fd) {
        if (fd_ >= 0) close(fd_);
        fd_ = fd;
    }

private:
    int fd_ = -1;
};

// A timeout as libfuse sends it: seconds, and the nanoseconds beyond.
struct Timeout {
    std::uint64_t seconds;
    std::uint32_t ns;

    explicit Timeout(double timeout) {
        const double bounded = std::clamp(timeout, 0.0, 1e15), whole = std::floor(bounded);
        seconds = static_cast<std::uint64_t>(whole);
        ns = static_cast<std::uint32_t>((bounded - whole) * 1e9);
    }
};

// Attributes of an object that is shown with another inode number.
inline fuse_attr attributes_of(std::uint64_t ino, const struct stat& st) {
    fuse_attr attr{};
    attr.ino = ino;
    attr.size = static_cast<std::uint64_t>(st.st_size);
    attr.blocks = static_cast<std::uint64_t>(st.st_blocks);
    attr.atime = static_cast<std::uint64_t>(st.st_atim.tv_sec);
    attr.mtime = static_cast<std::uint64_t>(st.st_mtim.tv_sec);
    attr.ctime = static_cast<std::uint64_t>(st.st_ctim.tv_sec);
    attr.atimensec = static_cast<std::uint32_t>(st.st_atim.tv_nsec);
    attr.mtimensec = static_cast<std::uint32_t>(st.st_mtim.tv_nsec);
    attr.ctimensec = static_cast<std::uint32_t>(st.st_ctim.tv_nsec);
    attr.mode = st.st_mode;
    attr.nlink = static_cast<std::uint32_t>(st.st_nlink);
    attr.uid = st.st_uid;
    attr.gid = st.st_gid;
    attr.rdev = static_cast<std::uint32_t>(st.st_rdev);
    attr.blksize = static_cast<std::uint32_t>(st.st_blksize);
    return attr;
}

// Entries.attributes: the root's node id is FUSE's, its number its own.
inline fuse_attr attributes_of(const InodeState& inode, const struct stat& st) {
    return attributes_of(inode.node == InodeState::root_node ? st.st_ino : inode.node, st);
}

// Entries.attributes, of an inode that was found in a directory.
inline fuse_entry_out entry_of(const InodeState& inode, const struct stat& st, const InodeStates& inodes) {
    fuse_entry_out out{};
    const Timeout timeout(inodes.timeout_of(inode)), entry_timeout(inodes.timeout_of(*inode.parent));
    out.nodeid = inode.node;
    out.generation = inode.generation;
    out.entry_valid = entry_timeout.seconds;
    out.entry_valid_nsec = entry_timeout.ns;
    out.attr_valid = timeout.seconds;
    out.attr_valid_nsec = timeout.ns;
    out.attr = attributes_of(inode, st);
    return out;
}

template <class Struct>
Bytes bytes_of(const Struct& reply) {
    return {reinterpret_cast<const std::byte*>(&reply), sizeof reply};
}

// The string at the beginning of some bytes, which have its zero byte.
inline std::optional<std::string_view> string_in(Bytes bytes) {
    const auto end = std::ranges::find(bytes, std::byte{0});
    if (end == bytes.end()) return std::nullopt;
    return std::string_view(reinterpret_cast<const char*>(bytes.data()), static_cast<std::size_t>(end - bytes.begin()));
}

}  // namespace cleanfs
