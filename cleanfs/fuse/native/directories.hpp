// Open, list and close directories without Python, where the source's reply comes from memory; and report free space.
//
// A listing carries attributes (READDIRPLUS), so each entry becomes an inode. One call into Python for each reply makes
// those that are new. As in metadata.hpp, a request is served only where no rule holds it back. In all other cases nothing
// has been done, and Python, the reference, goes on from the same state (cleanfs/fs/listing.py).
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "channel.hpp"
#include "directory_state.hpp"
#include "inode_state.hpp"
#include "metadata.hpp"

namespace cleanfs {

class Directories {
public:
    // Both must outlive this object.
    Directories(InodeStates& inodes, Metadata& metadata) : inodes_(inodes), metadata_(metadata) {}

    // The state must outlive the directory's time here.
    void add(std::uint64_t fh, DirectoryState& directory) { directories_[fh] = &directory; }
    void remove(std::uint64_t fh) { directories_.erase(fh); }

    // The fd of an open directory; -1 if there is none by that number.
    int fd_of(std::uint64_t fh) const {
        const DirectoryState* directory = find(fh);
        return directory == nullptr ? -1 : directory->fd;
    }

    // Serve a request and send the reply. False if Python must.
    bool serve(const Message& message, Channel& channel);

private:
    // A name of the reply under way.
    struct Entry {
        std::size_t place;  // in the reply
        struct stat st;
        InodeState* inode;  // null until Python has entered it
        KernelViewState::Told told;  // before the reply
    };
    enum class Added : std::uint8_t { yes, no_space, for_python };

    bool open(const Message& message, Channel& channel);
    bool list(const Message& message, Channel& channel);
    bool close(const Message& message, Channel& channel);
    bool report_space(const Message& message, Channel& channel);

    DirectoryState* find(std::uint64_t fh) const;
    std::shared_ptr<const Names> read_names(int fd, InlineState& policy);
    bool fill(int fd, const InodeState& directory, const Names& names, std::uint64_t offset);
    Added add_dots(int fd, const InodeState& directory, std::uint64_t offset);
    Added add_name(int fd, const InodeState& directory, const Names& names, std::size_t position);
    bool append(std::string_view name, const struct stat& st, std::uint64_t next);
    bool enter(const InodeState& directory);
    void tell();
    void take_back(Channel& channel);

    InodeStates& inodes_;
    Metadata& metadata_;
    std::unordered_map<std::uint64_t, DirectoryState*> directories_;  // by fh
    // Of the request under way.
    std::vector<std::byte> names_buffer_, reply_;
    std::size_t reply_size_ = 0;  // at most
    std::vector<Entry> entries_;
    std::vector<Found> found_;          // those that Python must enter or move,
    std::vector<std::size_t> entered_;  // and which entries they are
    std::vector<std::uint64_t> nodes_;
};

}  // namespace cleanfs
