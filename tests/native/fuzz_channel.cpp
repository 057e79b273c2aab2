// Push input through the FUSE channel as messages of the kernel, over a pair of sockets. The input is libFuzzer's, or
// random. What is passed on must be complete, and everything that reads it must stay within it.
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "channel.hpp"
#include "fuzz_main.hpp"
#include "pages.hpp"

namespace {

using cleanfs::Bytes;
using cleanfs::Channel;
using cleanfs::Message;

volatile std::size_t sum;  // so that the compiler leaves no read out

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "fuzz_channel: %s\n", what);
    std::abort();
}

// A device whose other end is the kernel's.
class Device {
public:
    Device() {
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends_) == -1) fail("no sockets");
    }
    ~Device() {
        close(ends_[0]);
        close(ends_[1]);
    }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    int fd() const { return ends_[0]; }
    void send(Bytes bytes) const {
        if (write(ends_[1], bytes.data(), bytes.size()) == -1) fail("a message was not sent");
    }
    // The unique of a reply, which must be an error without a body; none if there is no reply.
    std::optional<fuse_out_header> reply() const {
        fuse_out_header header;
        const ssize_t got = recv(ends_[1], &header, sizeof header, MSG_DONTWAIT | MSG_TRUNC);
        if (got == -1) return std::nullopt;
        if (got != sizeof header || header.len != sizeof header || header.error >= 0) fail("a wrong reply");
        return header;
    }

private:
    int ends_[2];
};

void look_at(const Message& message) {
    sum = message.flags() + message.file_flags();
    if (auto forget = message.body_as<fuse_batch_forget_in>()) sum = sum + forget->count;
    if (auto write = message.body_as<fuse_write_in>()) sum = sum + write->size;
    for (std::byte byte : message.body()) sum = sum + std::to_integer<std::uint32_t>(byte);
}

// Read names, and data of a size that was announced, without looking where the message ends: so does libfuse.
void parse_as_libfuse(const char* message) {
    fuse_in_header header;
    std::memcpy(&header, message, sizeof header);
    const char* body = message + sizeof header;
    std::uint32_t size;
    switch (header.opcode) {
        case FUSE_LOOKUP:
        case FUSE_UNLINK:
        case FUSE_REMOVEXATTR:
            sum = std::strlen(body);
            break;
        case FUSE_SYMLINK:
            sum = std::strlen(body + std::strlen(body) + 1);
            break;
        case FUSE_CREATE:
            sum = std::strlen(body + sizeof(fuse_create_in));
            break;
        case FUSE_RENAME2: {
            const char* name = body + sizeof(fuse_rename2_in);
            sum = std::strlen(name + std::strlen(name) + 1);
            break;
        }
        case FUSE_SETXATTR: {
            const char* name = body + FUSE_COMPAT_SETXATTR_IN_SIZE;
            std::memcpy(&size, body, sizeof size);
            sum = std::string(name + std::strlen(name) + 1, size).size();
            break;
        }
        case FUSE_WRITE:
            std::memcpy(&size, body + offsetof(fuse_write_in, size), sizeof size);
            sum = std::string(body + sizeof(fuse_write_in), size).size();
            break;
        case FUSE_BATCH_FORGET:
            std::memcpy(&size, body, sizeof size);
            sum = std::string(body + sizeof(fuse_batch_forget_in), size * sizeof(fuse_forget_one)).size();
            break;
        default:
            break;
    }
}

// libfuse reads what was left to it into a buffer of its own, here just as large as the message.
void read_as_libfuse(Channel& channel, std::size_t size) {
    channel.leave_to_libfuse();
    std::vector<std::byte> buffer(size);
    if (channel.read_for_libfuse(buffer.data(), size - 1) != -1) fail("a message was cut");
    channel.leave_to_libfuse();
    if (channel.read_for_libfuse(buffer.data(), size) != static_cast<ssize_t>(size)) fail("a message is missing");
    parse_as_libfuse(reinterpret_cast<const char*>(buffer.data()));
    if (channel.read_for_libfuse(buffer.data(), size) != -1 || errno != EINTR) fail("a message was read twice");
}

void receive(Channel& channel, const Device& device, Bytes bytes) {
    device.send(bytes);
    const auto message = channel.receive_now(nullptr);
    const auto reply = device.reply();
    if (message) {
        if (reply || !message->is_complete() || message->bytes().size() != bytes.size()) fail("passed on in error");
        look_at(*message);
        read_as_libfuse(channel, bytes.size());
    } else if (const auto parsed = Message::parse(bytes)) {
        look_at(*parsed);
        if (parsed->is_complete() && !parsed->is_foreign_ioctl()) fail("a complete message was not passed on");
        if (parsed->has_reply() != reply.has_value()) fail("a reply too few or too many");
        if (reply && reply->unique != parsed->header().unique) fail("a reply to another request");
        if (reply && reply->error != (parsed->is_complete() ? -ENOTTY : -EIO)) fail("another error");
    }
}

}  // namespace

// The first byte of each piece is its length; a piece of odd length gets its true length into its header, and an opcode
// that has a meaning.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const Device device;
    Channel channel(device.fd(), -1, 0);
    while (size > 1) {
        const std::size_t length = std::min<std::size_t>(data[0], size - 1);
        // A buffer of its own, so that reading beyond it is seen.
        std::vector<std::byte> piece(length);
        for (std::size_t at = 0; at < length; ++at) piece[at] = static_cast<std::byte>(data[1 + at]);
        data += 1 + length;
        size -= 1 + length;
        if (piece.empty()) continue;
        if (length % 2 == 1 && length >= sizeof(fuse_in_header)) {
            fuse_in_header header;
            std::memcpy(&header, piece.data(), sizeof header);
            header.len = static_cast<std::uint32_t>(length);
            header.opcode %= 64;
            std::memcpy(piece.data(), &header, sizeof header);
        }
        receive(channel, device, piece);
    }
    return 0;
}

#ifndef LIBFUZZER
int main(int argc, char** argv) {
    // Zeros end names, and small numbers are lengths that may be right.
    fuzz("fuzz_channel", argc, argv, 4096, 1024, [](Random& random) { return random.below(2) ? random.next() : random.below(3); });
}
#endif
