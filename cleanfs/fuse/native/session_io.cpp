#include "session_io.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "fuse_uring.hpp"
#include "raise_errno.hpp"
#include "session.hpp"

namespace cleanfs {

void SessionIo::attach() {
    fuse_session* session = mounted_session();
    if (session == nullptr) raise_errno(ENOTCONN);
    static const fuse_custom_io io = [] {
        fuse_custom_io calls{};
        calls.read = [](int fd, void* to, std::size_t size, void*) -> ssize_t {
            return attached == nullptr ? read(fd, to, size) : attached->channel_.read_for_libfuse(to, size);
        };
        calls.writev = [](int fd, iovec* parts, int count, void*) -> ssize_t {
            return attached == nullptr ? writev(fd, parts, count) : attached->write(parts, count);
        };
        return calls;
    }();
    const int result = fuse_session_custom_io(session, &io, channel_.device());
    if (result != 0) raise_errno(result < 0 ? -result : EINVAL);
    attached = this;
}

void SessionIo::detach() {
    if (attached == this) attached = nullptr;
}

void SessionIo::leave_to_libfuse() {
    if (received_ && received_->header().opcode == FUSE_INIT) {
        const Bytes bytes = received_->bytes();
        init_request_ = nb::bytes(bytes.data(), bytes.size());
    }
    channel_.leave_to_libfuse();
}

ssize_t SessionIo::write(iovec* parts, int count) {
    fuse_out_header header;
    if (count < 1 || parts[0].iov_len < sizeof header) return errno = EINVAL, -1;
    std::memcpy(&header, parts[0].iov_base, sizeof header);
    if (header.unique == 0) return writev(channel_.device(), parts, count);  // a notification, from any thread
    nb::gil_scoped_acquire locked;
    const nb::object request = requests_.take(header.unique);
    const bool is_init = !request.is_none() && nb::cast<Request&>(request).header.opcode == FUSE_INIT;
    const Sent sent = is_init ? send_init_reply(parts, count) : channel_.send(parts, count);
    if (sent == Sent::failed) return -1;
    if (sent == Sent::refused) requests_.roll_back(request);
    return header.len;
}

Sent SessionIo::send_init_reply(iovec* parts, int count) {
    try {
        std::string whole;
        for (int at = 0; at < count; ++at) whole.append(static_cast<const char*>(parts[at].iov_base), parts[at].iov_len);
        const nb::object changed = init_reply_(init_request_, nb::bytes(whole.data(), whole.size()));
        const nb::bytes reply = nb::cast<nb::bytes>(changed);
        const auto init = parse(reply);
        received_.reset();
        if (init) channel_.set_max_write(init->max_write);
        const iovec one{const_cast<void*>(reply.data()), reply.size()};
        const Sent sent = channel_.send(&one, 1);
        if (channel_.queues() && init) start_queues(*init);
        return sent;
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the reply to FUSE_INIT");
        return channel_.send(parts, count);
    }
}

std::optional<fuse_init_out> SessionIo::parse(const nb::bytes& init_reply) const {
    fuse_init_out init;
    if (init_reply.size() < sizeof(fuse_out_header) + sizeof init) return std::nullopt;
    std::memcpy(&init, static_cast<const std::byte*>(init_reply.data()) + sizeof(fuse_out_header), sizeof init);
    return init;
}

// The kernel holds requests back until it has a queue for each processor, or was refused one.
void SessionIo::start_queues(const fuse_init_out& init) {
    const bool agreed = (init.flags & FUSE_INIT_EXT) != 0 && (init.flags2 & fuse_over_io_uring_flags2) != 0;
    const std::size_t pages = std::max<std::size_t>(init.max_pages, 32);  // FUSE_DEFAULT_MAX_PAGES_PER_REQ
    const auto page_size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t max_payload = std::max<std::size_t>({init.max_write, pages * page_size, FUSE_MIN_READ_BUFFER});
    if (!agreed || !channel_.start_queues(max_payload, fast_path_.get())) channel_.drop_queues();
}

}  // namespace cleanfs
