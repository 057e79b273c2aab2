// Have libfuse read and write through the channel: callbacks in place of read(2) and writev(2) on the FUSE device
// (fuse_session_custom_io(3)).
#pragma once

#include <nanobind/nanobind.h>
#include <sys/uio.h>

#include <optional>

#include "channel.hpp"
#include "requests.hpp"

namespace cleanfs {

class SessionIo {
public:
    // `received` is the message that the channel received last. `init_reply` is called with the message of FUSE_INIT and
    // libfuse's reply, and returns the reply to send.
    SessionIo(Channel& channel, std::optional<Message>& received, RequestsInProgress& requests, nb::callable init_reply)
        : channel_(channel), received_(received), requests_(requests), init_reply_(std::move(init_reply)) {}
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
    void make_room(const nb::bytes& init_reply);

    static inline SessionIo* attached = nullptr;

    Channel& channel_;
    std::optional<Message>& received_;
    RequestsInProgress& requests_;
    nb::callable init_reply_;
    nb::bytes init_request_{"", 0};
};

}  // namespace cleanfs
