// Open files without Python, where nothing about them has changed, and close them.
//
// A file that is opened here has no FileHandle. Python makes one when it needs it (`adopt`), from all that is known
// here; then the file is Python's. A request is served only where no rule holds it back. In all other cases nothing has
// been done, and the caller hands the request to Python, which is the reference for every rule (cleanfs/fs/opening.py,
// cleanfs/vfs/handles.py; the tests compare the two).
#pragma once

#include <fcntl.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "channel.hpp"
#include "inode_state.hpp"
#include "metadata.hpp"
#include "state.hpp"
#include "stream.hpp"

namespace cleanfs {

class OpenHandles {
public:
    // All of them must outlive this object.
    OpenHandles(CacheState& caches, InodeStates& inodes, Metadata& metadata)
        : caches_(caches), inodes_(inodes), metadata_(metadata) {}
    ~OpenHandles();
    OpenHandles(const OpenHandles&) = delete;
    OpenHandles& operator=(const OpenHandles&) = delete;

    // Serve an OPEN or RELEASE, and send the reply. False if Python must.
    bool open(const Message& message, Channel& channel);
    bool release(const Message& message, Channel& channel);

    // Whether another file may be opened without parking inodes (InodeTable.shrink).
    bool has_room() const { return inodes_.open_fds < inodes_.fd_budget; }
    // Make a handle of a file that was opened with `flags`; takes over the fd. Returns its number. The inode has a
    // record. If it throws, nothing was changed.
    std::uint64_t add(InodeState& inode, int fd, std::uint32_t flags);
    // Take back a handle that the kernel was not told of, or close one.
    void close(std::uint64_t fh, Channel& channel);

    // Null if no file was opened here by that number.
    HandleState* find(std::uint64_t fh);
    std::size_t size() const { return handles_.size(); }

    struct Adopted {
        InodeState* inode;
        FileState* file;
        int fd;
        std::uint32_t flags;
        Stream stream;
        bool writes;
        std::int64_t nowait_tried_at;
    };
    // Give up a file. Its fd still counts as one of the inode's.
    std::optional<Adopted> adopt(std::uint64_t fh);
    // The nodes of the files that are open for writing.
    std::vector<std::uint64_t> writers() const;

private:
    struct Handle {
        bool writable() const { return (flags & O_ACCMODE) != O_RDONLY; }

        InodeState* inode;
        std::uint32_t flags;
        Stream stream;
        HandleState state;
    };

    bool may_be_stale(const InodeState& inode) const;

    CacheState& caches_;
    InodeStates& inodes_;
    Metadata& metadata_;
    std::unordered_map<std::uint64_t, Handle> handles_;  // by fh. References to its values last
    std::uint64_t last_ = std::uint64_t{1} << 63;        // fh. Python counts from 1
};

}  // namespace cleanfs
