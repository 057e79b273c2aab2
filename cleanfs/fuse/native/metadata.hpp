// Serve requests for names and attributes without Python, where the source's reply comes from memory.
//
// A request is served only where no rule holds it back. In all other cases nothing has been done, and the caller hands
// the request to Python, which is the reference for every rule (cleanfs/fs/operations.py, cleanfs/vfs/tree.py; the tests
// compare the two).
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "channel.hpp"
#include "inode_state.hpp"

namespace cleanfs {

// A descriptor that is closed unless it is released.
class Descriptor {
public:
    explicit Descriptor(int fd) : fd_(fd) {}
    ~Descriptor() {
        if (fd_ >= 0) close(fd_);
    }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;

    int get() const { return fd_; }
    void release() { fd_ = -1; }

private:
    int fd_;
};

// The name at the beginning of some bytes, if it is one that leads to a child, and has its zero byte
// (namespace.forbid_slash).
std::optional<std::string_view> name_in(Bytes bytes);

class Metadata {
public:
    explicit Metadata(InodeStates& inodes) : inodes_(inodes) { unused_.reserve(1); }

    // Serve a request and send the reply. False if Python must.
    bool serve(const Message& message, Channel& channel);

    // Tree.using, where that does not wait: the inode, with a descriptor. Null if Python must find it.
    InodeState* find_held(std::uint64_t node);
    // Have Python drop an inode to which neither the kernel nor a file handle refers.
    void drop_if_unused(const InodeState& inode, Channel& channel);

private:
    bool get_attributes(const Message& message, Channel& channel);
    bool look_up(const Message& message, Channel& channel);
    bool read_link(const Message& message, Channel& channel);
    bool get_xattr(const Message& message, Channel& channel);
    bool forget(const Message& message, Channel& channel);
    bool forget_batch(const Message& message, Channel& channel);

    bool is_as_known(const InodeState& inode, const struct stat& st) const;
    bool hold(InodeState& inode, Descriptor& found, const struct stat& st);
    bool look_up_absent(const Message& message, Channel& channel) const;
    void take_back(std::uint64_t node, std::uint64_t nlookup);
    void drop_unused(Channel& channel);

    InodeStates& inodes_;
    std::vector<std::uint64_t> unused_;  // nodes that the message under way made unused
    std::vector<std::byte> buffer_;
};

}  // namespace cleanfs
