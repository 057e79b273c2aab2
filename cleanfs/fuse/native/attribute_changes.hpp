// Set modes, owners and times without Python. A size is Python's: it frees or takes blocks.
//
// A request is served only where no rule holds it back. In all other cases the caller hands the request to Python, which
// is the reference for every rule (cleanfs/fs/operations.py, cleanfs/vfs/tree.py). Python makes a change once more that
// failed, or that others have changed the file beside: then it finds another fingerprint than the known one.
#pragma once

#include "channel.hpp"
#include "inode_state.hpp"
#include "metadata.hpp"
#include "state.hpp"

namespace cleanfs {

class AttributeChanges {
public:
    // All of them must outlive this object.
    AttributeChanges(CacheState& caches, InodeStates& inodes, Metadata& metadata)
        : caches_(caches), inodes_(inodes), metadata_(metadata) {}

    // Serve a SETATTR, and send the reply. False if Python must.
    bool set(const Message& message, Channel& channel);

private:
    bool may_be_by_stale_name(const InodeState& inode, const fuse_setattr_in& in, std::uint32_t thread) const;
    bool is_as_expected(const InodeState& inode, const Stamps& before, const Stamps& after, bool moves_mtime) const;

    CacheState& caches_;
    InodeStates& inodes_;
    Metadata& metadata_;
};

}  // namespace cleanfs
