// The requests that Python handles, from their messages on to their replies.
#pragma once

#include <fcntl.h>
#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>

#include "channel.hpp"

namespace cleanfs {

namespace nb = nanobind;

// One message as Python sees it (cleanfs.fuse.request).
struct Request {
    explicit Request(const fuse_in_header& of) : header(of) {}
    explicit Request(const Message& message)
        : header(message.header()), flags(message.flags()), file_flags(message.file_flags()) {}

    fuse_in_header header;
    std::uint32_t flags = 0, file_flags = 0;
    nb::object rollback = nb::none();
    bool interrupted = false;
    nb::object on_interrupt = nb::none();
};

// Those without a reply yet, by unique. The GIL protects it.
class RequestsInProgress {
public:
    // `refused` is called with a request whose reply the kernel refused.
    explicit RequestsInProgress(nb::callable refused) : refused_(std::move(refused)) {}

    nb::object add(std::uint64_t unique, Request request) { return by_unique_[unique] = nb::cast(std::move(request)); }
    void remove(std::uint64_t unique) { by_unique_.erase(unique); }
    // None if it is not there.
    nb::object find(std::uint64_t unique) const {
        const auto found = by_unique_.find(unique);
        return found == by_unique_.end() ? nb::none() : found->second;
    }
    nb::object take(std::uint64_t unique) {
        nb::object request = find(unique);
        by_unique_.erase(unique);
        return request;
    }
    std::size_t size() const { return by_unique_.size(); }
    // The READs and WRITEs with O_DIRECT that have a requester.
    nb::list direct() const {
        nb::list found;
        for (const auto& [unique, object] : by_unique_) {
            const auto& request = nb::cast<const Request&>(object);
            if ((request.file_flags & O_DIRECT) != 0 && request.header.pid != 0) found.append(object);
        }
        return found;
    }

    // Undo what the refused reply to a request gave. Does nothing for None.
    void roll_back(nb::handle request) const noexcept {
        if (request.is_none()) return;
        try {
            refused_(request);
        } catch (nb::python_error& error) {
            error.discard_as_unraisable("the rollback of a refused reply");
        }
    }

private:
    std::unordered_map<std::uint64_t, nb::object> by_unique_;
    nb::callable refused_;
};

}  // namespace cleanfs
