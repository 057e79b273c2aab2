// What the FUSE channel must know of an open directory to list it without Python.
//
// Python writes it, on trio's thread (cleanfs/vfs/directory_state.py says what each field means). The channel reads and
// writes it on the same thread, so there is no lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace cleanfs {

// The names in a directory, in order, packed: cleanfs.source.listing.Names.
class Names {
public:
    std::size_t size() const { return ends_.size(); }
    std::string_view operator[](std::size_t position) const {
        const std::size_t start = position == 0 ? 0 : ends_[position - 1] + std::size_t{1};
        return {packed_.data() + start, ends_[position] - start};
    }
    // The same, with a zero byte at its end.
    const char* c_str(std::size_t position) const { return (*this)[position].data(); }

    void push_back(std::string_view name) {
        packed_.append(name).push_back('\0');
        ends_.push_back(static_cast<std::uint32_t>(packed_.size() - 1));
    }
    void shrink_to_fit() {
        packed_.shrink_to_fit();
        ends_.shrink_to_fit();
    }
    std::size_t memory() const { return packed_.capacity() + ends_.capacity() * sizeof ends_[0]; }

private:
    std::string packed_;  // each with a zero byte
    std::vector<std::uint32_t> ends_;
};

// The native part of cleanfs.vfs.handles.DirHandle.
struct DirectoryState {
    int fd = -1;
    std::shared_ptr<const Names> names = std::make_shared<Names>();
    std::uint32_t rewinding = 0;
};

}  // namespace cleanfs
