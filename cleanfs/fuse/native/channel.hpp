// The FUSE channel: reads every message of the kernel, and writes every reply.
//
// `receive` reads one message from the device. The caller, on trio's thread, looks at its header and either handles it
// or leaves it for libfuse. libfuse reads through `read_for_libfuse`, and its replies go through `send`
// (fuse_session_custom_io(3); session_io.hpp). So the channel knows the id of each request, whose it is, and whether the
// kernel took the reply: ENOENT says that the requester is gone.
//
// The bytes come from the kernel, but what they say comes from any user of the mount. Nothing is read beyond the
// message's length; `Message` is the only place that looks into it. libfuse trusts the lengths in a message, so it is
// left only what is complete.
//
// With queues of io_uring (queues.hpp), most messages come by these, and their replies go back there.
//
// Not thread-safe, except `reply` and `send`; `count` needs the state lock.
#pragma once

#include <linux/fuse.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>

#include "busy_poll.hpp"

namespace cleanfs {

class FastPath;
class Queues;

using Bytes = std::span<const std::byte>;

// One message of the kernel.
class Message {
public:
    // None if the bytes are too few for a header.
    static std::optional<Message> parse(Bytes bytes);

    // Whether the length is that of the header, and the body has at least what libfuse and the kernel's own header
    // expect of this opcode: its struct, the names after it with their zero bytes, and the data that it announces.
    bool is_complete() const;
    // Whether it is an ioctl that no handler knows: ENOTTY, as for any file that is no device. Python's open() alone
    // makes one for each file (isatty). ENOSYS would make the kernel refuse them all for good. Only if `is_complete`.
    bool is_foreign_ioctl() const;
    // Whether the kernel waits for a reply.
    bool has_reply() const;

    const fuse_in_header& header() const { return header_; }
    Bytes bytes() const { return bytes_; }
    Bytes body() const { return bytes_.subspan(sizeof(fuse_in_header)); }
    // The struct at the beginning of the body; none if the body is too short.
    template <class Struct>
    std::optional<Struct> body_as() const {
        if (body().size() < sizeof(Struct)) return std::nullopt;
        Struct found;
        std::memcpy(&found, body().data(), sizeof found);
        return found;
    }
    // Those of an OPEN, OPENDIR, CREATE, READ or WRITE (their fuse_*_in), or the `valid` of a SETATTR; else 0.
    std::uint32_t flags() const;
    // The open file's flags as they are now (fcntl(2), F_GETFL), of a READ, WRITE or OPENDIR; else 0.
    std::uint32_t file_flags() const;

private:
    explicit Message(Bytes bytes) : bytes_(bytes) { std::memcpy(&header_, bytes.data(), sizeof header_); }

    Bytes bytes_;
    fuse_in_header header_;
};

// What became of a reply.
enum class Sent : std::uint8_t {
    taken,
    refused,  // ENOENT: the requester is gone
    failed,   // any other error, in errno
};

class Channel {
public:
    // The device's fd stays the caller's. It is set to O_NONBLOCK. `scheduler_fd` is readable when the scheduler must
    // run; -1 if that is not known, and then nothing sleeps here. Throws std::system_error.
    Channel(int device, int scheduler_fd, std::int64_t busy_poll_ns);
    ~Channel();

    // Read the next message that `fast_path` (which may be null) does not serve. One that is not complete gets EIO here.
    // None if the scheduler must run: at `until` (now_ns), when its fd is readable, or, if that is not known, when none
    // came while polling. Throws std::system_error if the connection has ended (ENODEV). The message is valid until the
    // next call.
    std::optional<Message> receive(std::int64_t until, FastPath* fast_path);
    // The same, if a message is there.
    std::optional<Message> receive_now(FastPath* fast_path);

    // Send a reply: `error` is 0 or a negative errno.
    Sent reply(std::uint64_t unique, int error, Bytes body) const;
    // Send a reply that begins with a fuse_out_header.
    Sent send(const iovec* parts, int count) const;

    // Have the kernel send messages by queues, if it agrees to that in FUSE_INIT. Throws std::system_error.
    void make_queues();
    // FUSE_INIT had its reply, and the kernel agreed to messages of this size, or did not. False if it broke its word.
    bool start_queues(std::size_t max_payload, FastPath* fast_path);
    // All messages come by the device.
    void drop_queues();
    // Null if all messages come by the device.
    const std::shared_ptr<Queues>& queues() const { return queues_; }

    // Have the kernel take the reply that this thread sent last, if it came by a queue of its own.
    void push() const;

    int device() const { return device_; }
    Window& window() { return window_; }
    // Messages that were found by polling, and waits that went to sleep.
    std::uint64_t polled() const { return polled_; }
    std::uint64_t slept() const { return slept_; }

    // Make room for WRITEs of this many bytes, as the kernel demands it for every read(2). A message that was received
    // is lost.
    void set_max_write(std::size_t bytes);

    // How many messages came, by opcode. The last one counts all that are higher.
    const std::array<std::uint64_t, 64>& opcodes() const { return opcodes_; }
    void count(const Message& message, int times = 1) {
        opcodes_[std::min<std::size_t>(message.header().opcode, opcodes_.size() - 1)] += static_cast<std::uint64_t>(times);
    }

    // For libfuse: read the message that `receive` left for it. -1 and errno EINTR if there is none,
    // or the device's error.
    ssize_t read_for_libfuse(void* to, std::size_t size);
    // Leave the message that was received last to libfuse.
    void leave_to_libfuse() { left_ = true; }
    // What served a message has made a task runnable: the next `receive` returns at once.
    void let_scheduler_run() { task_runnable_ = true; }

private:
    // How often to look whether the scheduler must run.
    static constexpr std::int64_t look_ns = 20'000;

    enum class Read : std::uint8_t { nothing, served, message };

    std::optional<Message> receive_from_queues(std::int64_t until, FastPath* fast_path);
    bool sleep_beside_queues(std::int64_t ns);
    Read read_message(FastPath* fast_path);
    Read serve(const Message& message, FastPath* fast_path);
    std::optional<Message> hand_over();
    bool sleep(std::int64_t ns);
    bool scheduler_must_run() const;

    const int device_, scheduler_fd_;
    Window window_;
    std::int64_t idle_since_ = 0;  // the last message was read, or its handler began to wait
    bool handed_over_ = false;     // a message, whose handler runs
    std::array<std::uint64_t, 64> opcodes_{};
    bool awake_ = true;            // since the last message
    std::uint64_t polled_ = 0, slept_ = 0;
    std::size_t capacity_ = 0;
    std::unique_ptr<std::byte[]> buffer_;
    Bytes received_;            // the last message, in the buffer or in a queue
    bool left_ = false;         // to libfuse, which has not read it yet
    bool task_runnable_ = false;
    bool device_readable_ = true;  // perhaps; looked at only where there are queues
    std::shared_ptr<Queues> queues_;
};

}  // namespace cleanfs
