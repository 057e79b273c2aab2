// The channel as Python uses it: cleanfs.fuse.channel is its only user, and says what it is for.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "channel.hpp"
#include "py_fast_path.hpp"
#include "requests.hpp"
#include "session_io.hpp"

namespace cleanfs {

class PyChannel {
public:
    PyChannel(int device, int scheduler_fd, std::int64_t busy_poll_ns, nb::callable init_reply, nb::callable refused)
        : channel_(device, scheduler_fd, busy_poll_ns),
          requests_(std::move(refused)),
          session_(channel_, fast_path_, message_, requests_, std::move(init_reply)) {}

    ~PyChannel() { drop_queues(); }
    PyChannel(const PyChannel&) = delete;
    PyChannel& operator=(const PyChannel&) = delete;

    Channel& channel() { return channel_; }
    // Their threads may wait for the GIL.
    void drop_queues() {
        const nb::gil_scoped_release unlocked;
        channel_.drop_queues();
    }
    SessionIo& session() { return session_; }
    PyFastPath& fast_path() { return fast_path_; }

    // None if there is no message now.
    std::optional<nb::object> receive_now();
    // `until_seconds` from now on, the scheduler must run. None if it must run before a message is there.
    std::optional<nb::object> receive(double until_seconds);
    // That of the message received last.
    nb::bytes body() const;

    // False if the requester is gone. Raises OSError.
    bool reply(std::uint64_t unique, int error, const nb::bytes& body);
    // Its reply will be sent now.
    void ended(std::uint64_t unique) { requests_.remove(unique); }

    // The request with that id, if it has no reply yet, or None.
    nb::object request(std::uint64_t unique);
    std::size_t in_progress() const { return requests_.size(); }
    nb::list direct_requests() const { return requests_.direct(); }
    // How many FSYNCs are under way in native threads.
    std::size_t syncing();

private:
    template <class Receive>
    std::optional<nb::object> receive_by(Receive&& receive);
    void end_synced();

    Channel channel_;
    PyFastPath fast_path_;
    std::optional<Message> message_;  // received last
    RequestsInProgress requests_;
    SessionIo session_;
};

}  // namespace cleanfs
