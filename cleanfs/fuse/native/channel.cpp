#include "channel.hpp"

#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "fast_path.hpp"

namespace cleanfs {

namespace {

std::int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * std::int64_t{1'000'000'000} + now.tv_nsec;
}

}  // namespace

std::optional<Message> Message::parse(Bytes bytes) {
    if (bytes.size() < sizeof(fuse_in_header)) return std::nullopt;
    const Message message(bytes);
    if (message.header_.len != bytes.size()) return std::nullopt;
    return message;
}

std::uint32_t Message::flags() const {
    switch (header_.opcode) {
        case FUSE_OPEN:
        case FUSE_OPENDIR:
            if (auto open = body_as<fuse_open_in>()) return open->open_flags;
            return 0;
        case FUSE_CREATE:
            if (auto create = body_as<fuse_create_in>()) return create->open_flags;
            return 0;
        case FUSE_READ:
            if (auto read = body_as<fuse_read_in>()) return read->read_flags;
            return 0;
        case FUSE_WRITE:
            if (auto write = body_as<fuse_write_in>()) return write->write_flags;
            return 0;
        case FUSE_SETATTR:
            if (auto set = body_as<fuse_setattr_in>()) return set->valid;
            return 0;
        default:
            return 0;
    }
}

std::uint32_t Message::file_flags() const {
    if (header_.opcode == FUSE_READ) {
        if (auto read = body_as<fuse_read_in>()) return read->flags;
    } else if (header_.opcode == FUSE_WRITE) {
        if (auto write = body_as<fuse_write_in>()) return write->flags;
    }
    return 0;
}

Channel::Channel(int device) : device_(device), buffer_(std::make_unique_for_overwrite<std::byte[]>(capacity)) {
    const int flags = fcntl(device, F_GETFL);
    if (flags == -1 || fcntl(device, F_SETFL, flags | O_NONBLOCK) == -1) {
        throw std::system_error(errno, std::generic_category(), "the FUSE device");
    }
}

std::optional<Message> Channel::receive(std::int64_t poll_ns, std::int64_t budget_ns, FastPath* fast_path) {
    const std::int64_t began = now_ns();
    std::int64_t idle_since = began;
    left_ = false;
    for (;;) {
        const ssize_t got = read(device_, buffer_.get(), capacity);
        if (got > 0) {
            received_ = static_cast<std::size_t>(got);
            const auto message = Message::parse({buffer_.get(), received_});
            if (!message) continue;  // no kernel sends such a message
            if (fast_path == nullptr || !fast_path->serve(*message, *this)) return message;
            idle_since = now_ns();
            if (idle_since - began >= budget_ns) return std::nullopt;
            continue;
        }
        switch (got == 0 ? ENODEV : errno) {
            case EINTR:
            case ENOENT:  // the requester went away while the message was being read
                continue;
            case EAGAIN: {
                const std::int64_t now = now_ns();
                if (now - idle_since >= poll_ns || now - began >= budget_ns) return std::nullopt;
                continue;
            }
            default:
                throw std::system_error(got == 0 ? ENODEV : errno, std::generic_category(), "the FUSE device");
        }
    }
}

Sent Channel::reply(std::uint64_t unique, int error, Bytes body) {
    fuse_out_header header{};
    header.len = static_cast<std::uint32_t>(sizeof header + body.size());
    header.error = error;
    header.unique = unique;
    const iovec parts[] = {{&header, sizeof header}, {const_cast<std::byte*>(body.data()), body.size()}};
    return send(parts, body.empty() ? 1 : 2);
}

Sent Channel::send(const iovec* parts, int count) const {
    for (;;) {
        if (writev(device_, parts, count) >= 0) return Sent::taken;
        if (errno == ENOENT) return Sent::refused;
        if (errno != EINTR) return Sent::failed;
    }
}

ssize_t Channel::read_for_libfuse(void* to, std::size_t size) {
    if (!left_) {
        const ssize_t got = read(device_, to, size);  // at the end of the connection: its error
        if (got == -1 && errno == EAGAIN) errno = EINTR;
        return got;
    }
    left_ = false;
    if (received_ > size) {
        errno = EINVAL;
        return -1;
    }
    std::memcpy(to, buffer_.get(), received_);
    return static_cast<ssize_t>(received_);
}

}  // namespace cleanfs
