// Remove names without Python, up to the record of what that did: Python keeps it (cleanfs.fs.name_changes).
//
// A request is served only where no rule holds it back. In all other cases nothing has been done, and the caller hands
// the request to Python, which is the reference for every rule.
#pragma once

#include "channel.hpp"
#include "inode_state.hpp"
#include "metadata.hpp"

namespace cleanfs {

class NameChanges {
public:
    // Both must outlive this object.
    NameChanges(InodeStates& inodes, Metadata& metadata) : inodes_(inodes), metadata_(metadata) {}

    // Serve an UNLINK, and send the reply. False if Python must.
    bool unlink(const Message& message, Channel& channel);

private:
    InodeStates& inodes_;
    Metadata& metadata_;
};

}  // namespace cleanfs
