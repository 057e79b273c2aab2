// Serve requests for names and attributes without Python, where the source's reply comes from memory.
//
// A request is served only where no rule holds it back. In all other cases nothing has been done, and the caller hands
// the request to Python, which is the reference for every rule (cleanfs/fs/operations.py, cleanfs/vfs/tree.py; the tests
// compare the two).
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "attributes.hpp"
#include "channel.hpp"
#include "inode_state.hpp"

namespace cleanfs {

// Permissions._check_access, without a look at the ACL: whether the kernel admitted a user by mode, owners and ACL as they
// are.
bool may_access(const InodeState& inode, const struct stat& st, std::uint32_t uid);

// The name at the beginning of some bytes, if it is one that leads to a child, and has its zero byte
// (namespace.forbid_slash).
std::optional<std::string_view> name_in(Bytes bytes);

class Metadata {
public:
    explicit Metadata(InodeStates& inodes) : inodes_(inodes) { unused_.reserve(1); }

    // Serve a request and send the reply. False if Python must.
    bool serve(const Message& message, Channel& channel);
    // Whether such a request may be served without a call of Python.
    static bool may_serve_beside(const Message& message);
    // Whether the thread that serves the present request is the main one. Python's tables call trio.
    bool may_call_python = true;

    // Tree.using, where that does not wait: the inode, with a descriptor. Null if Python must find it.
    InodeState* find_held(std::uint64_t node);
    // Whether Python would reply with these attributes, and do nothing else: the file is as its record says, and the kernel
    // has no stale pages to drop first (Tree.observe, Tree.nothing_to_drop).
    bool is_as_known(const InodeState& inode, const struct stat& st) const;
    // Tree.is_named, of an inode whose directory is held.
    bool is_named(const InodeState& inode) const;

    // Make room for so many calls of the next, which then does not throw.
    void reserve_unused(std::size_t count) { unused_.reserve(count); }
    // InodeTable.forget, without the drop.
    void take_back(std::uint64_t node, std::uint64_t nlookup);
    // Drop those of which the last reference was taken back, unless they are in use.
    void drop_unused(Channel& channel);
    // Have Python make the kernel forget some inodes if there are too many (Tree.ask_to_forget).
    void keep_bounded(Channel& channel);
    // Have Python drop an inode to which neither the kernel nor a file handle refers.
    void drop_if_unused(const InodeState& inode, Channel& channel);

private:
    bool get_attributes(const Message& message, Channel& channel);
    int find_name(const InodeState& directory, const char* name) const;
    bool look_up(const Message& message, Channel& channel);
    bool read_link(const Message& message, Channel& channel);
    bool get_xattr(const Message& message, Channel& channel);
    bool forget(const Message& message, Channel& channel);
    bool forget_batch(const Message& message, Channel& channel);

    bool hold(InodeState& inode, Descriptor& found, const struct stat& st);
    bool reply_known(const Message& message, Channel& channel, InodeState& inode, const InodeState& parent, std::string_view name,
                     Descriptor& found, const struct stat& st);
    bool reply_new(const Message& message, Channel& channel, const InodeState& parent, std::string_view name, Descriptor& found,
                   const struct stat& st);
    void reply_entry(const Message& message, Channel& channel, InodeState& inode, const struct stat& st);
    bool look_up_absent(const Message& message, Channel& channel) const;

    InodeStates& inodes_;
    std::vector<std::uint64_t> unused_;  // nodes that the message under way made unused
    std::vector<std::byte> buffer_;
};

}  // namespace cleanfs
