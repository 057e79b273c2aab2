// The fast path of a channel as Python uses it: with the objects that it refers to, which this keeps alive.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>

#include "fast_path.hpp"

namespace cleanfs {

namespace nb = nanobind;

class PyFastPath {
public:
    // Serve hits from these caches from now on.
    void serve_from(nb::object caches) {
        fast_path_ = std::make_unique<FastPath>(nb::cast<CacheState&>(caches));
        caches_ = std::move(caches);
    }

    // The next ones do nothing before `serve_from`.
    void serve_metadata(nb::object inodes) {
        if (fast_path_ == nullptr) return;
        fast_path_->serve_metadata(nb::cast<InodeStates&>(inodes));
        inodes_ = std::move(inodes);
    }

    void add_handle(std::uint64_t fh, nb::object handle) {
        if (fast_path_ == nullptr) return;
        fast_path_->add(fh, nb::cast<HandleState&>(handle));
        handles_[fh] = std::move(handle);
    }

    void remove_handle(std::uint64_t fh) {
        if (fast_path_ != nullptr) fast_path_->remove(fh);
        handles_.erase(fh);
    }

    void add_directory(std::uint64_t fh, nb::object directory) {
        Directories* directories = fast_path_ == nullptr ? nullptr : fast_path_->directories();
        if (directories == nullptr) return;
        directories->add(fh, nb::cast<DirectoryState&>(directory));
        handles_[fh] = std::move(directory);
    }

    void remove_directory(std::uint64_t fh) {
        Directories* directories = fast_path_ == nullptr ? nullptr : fast_path_->directories();
        if (directories != nullptr) directories->remove(fh);
        handles_.erase(fh);
    }

    // A file that was opened here becomes Python's: its inode, record, fd, flags, stream, and whether it writes.
    // None if there is none.
    nb::object adopt_handle(std::uint64_t fh) {
        OpenHandles* handles = fast_path_ == nullptr ? nullptr : fast_path_->open_handles();
        const auto adopted = handles == nullptr ? std::nullopt : handles->adopt(fh);
        if (!adopted) return nb::none();
        return nb::make_tuple(nb::find(*adopted->inode), nb::find(*adopted->file), adopted->fd, adopted->flags, adopted->stream,
                              adopted->writes, adopted->nowait_tried_at);
    }

    std::size_t own_handles() {
        OpenHandles* handles = fast_path_ == nullptr ? nullptr : fast_path_->open_handles();
        return handles == nullptr ? 0 : handles->size();
    }

    nb::list own_writers() {
        OpenHandles* handles = fast_path_ == nullptr ? nullptr : fast_path_->open_handles();
        nb::list nodes;
        if (handles != nullptr) {
            for (const std::uint64_t node : handles->writers()) nodes.append(node);
        }
        return nodes;
    }

    // Null before `serve_from`.
    FastPath* get() { return fast_path_.get(); }

    const FastPath::Counters& counters() const {
        static const FastPath::Counters none;
        return fast_path_ == nullptr ? none : fast_path_->counters();
    }

private:
    std::unique_ptr<FastPath> fast_path_;
    nb::object caches_, inodes_;
    std::unordered_map<std::uint64_t, nb::object> handles_;  // by fh
};

}  // namespace cleanfs
