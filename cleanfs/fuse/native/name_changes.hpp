// Create files and remove names without Python, up to the record of what that did: Python keeps it
// (cleanfs.fs.operations.CleanFS.create, cleanfs.fs.name_changes).
//
// A request is served only where no rule holds it back. In all other cases nothing has been done, and the caller hands
// the request to Python, which is the reference for every rule.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "channel.hpp"
#include "inode_state.hpp"
#include "metadata.hpp"
#include "open_handles.hpp"

namespace cleanfs {

class NameChanges {
public:
    // All of them must outlive this object.
    NameChanges(InodeStates& inodes, Metadata& metadata, OpenHandles& handles)
        : inodes_(inodes), metadata_(metadata), handles_(handles) {}

    // Serve a CREATE or UNLINK, and send the reply. False if Python must.
    bool create(const Message& message, Channel& channel);
    bool unlink(const Message& message, Channel& channel);

private:
    // A directory in which a name is about to change; calls there do not wait.
    struct Place {
        InodeState* parent;
        std::string_view name;
        InlineState* policy;
    };
    std::optional<Place> find_place(const Message& message, Bytes name, std::int64_t now);

    InodeStates& inodes_;
    Metadata& metadata_;
    OpenHandles& handles_;
};

}  // namespace cleanfs
