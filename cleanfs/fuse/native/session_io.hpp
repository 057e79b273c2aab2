// Have libfuse read and write through the channel: callbacks in place of read(2) and writev(2) on the FUSE device
// (fuse_session_custom_io(3)).
#pragma once

#include <nanobind/nanobind.h>
#include <sys/uio.h>

#include <optional>

#include "channel.hpp"
#include "py_fast_path.hpp"
#include "requests.hpp"

namespace cleanfs {

class SessionIo {
public:
    // `received` is the message that the channel received last. `init_reply` is called with the message of FUSE_INIT and
    // libfuse's reply, and returns the reply to send.
    SessionIo(Channel& channel, PyFastPath& fast_path, std::optional<Message>& received, RequestsInProgress& requests,
              nb::callable init_reply)
        : channel_(channel), fast_path_(fast_path), received_(received), requests_(requests), init_reply_(std::move(init_reply)) {}
    ~SessionIo() { detach(); }
    SessionIo(const SessionIo&) = delete;
    SessionIo& operator=(const SessionIo&) = delete;

    // Attach to the session of this process. Raises OSError.
    void attach();
    void detach();

    // Have libfuse read the message that was received last.
    void leave_to_libfuse();

private:
    ssize_t write(iovec* parts, int count);
    Sent send_init_reply(iovec* parts, int count);
    std::optional<fuse_init_out> parse(const nb::bytes& init_reply) const;
    void start_queues(const fuse_init_out& init);

    static inline SessionIo* attached = nullptr;

    Channel& channel_;
    PyFastPath& fast_path_;
    std::optional<Message>& received_;
    RequestsInProgress& requests_;
    nb::callable init_reply_;
    nb::bytes init_request_{"", 0};
};

}  // namespace cleanfs
