#include "channel.hpp"

#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <system_error>
#include <utility>

#include "fast_path.hpp"
#include "queues.hpp"

namespace cleanfs {

namespace {

// The largest message before FUSE_INIT has told a size.
constexpr std::size_t first_max_write = std::size_t{1} << 20;

// What else may be in the largest message: a header, a struct, and a page for names.
constexpr std::size_t overhead = 8192;

// The least body of a request: a struct, then names that each end with a zero byte.
struct Form {
    std::size_t size = 0;
    int names = 0;
};

// Opcodes that Linux 6.1's header lacks, and the sizes of their structs.
constexpr std::uint32_t tmpfile_opcode = 51, statx_opcode = 52, copy_file_range_64_opcode = 53;
constexpr std::size_t statx_in_size = 24;

constexpr auto forms = [] {
    std::array<Form, copy_file_range_64_opcode + 1> of{};
    of[FUSE_LOOKUP] = {0, 1};
    of[FUSE_FORGET] = {sizeof(fuse_forget_in)};
    of[FUSE_GETATTR] = {sizeof(fuse_getattr_in)};
    of[FUSE_SETATTR] = {sizeof(fuse_setattr_in)};
    of[FUSE_SYMLINK] = {0, 2};
    of[FUSE_MKNOD] = {sizeof(fuse_mknod_in), 1};
    of[FUSE_MKDIR] = {sizeof(fuse_mkdir_in), 1};
    of[FUSE_UNLINK] = {0, 1};
    of[FUSE_RMDIR] = {0, 1};
    of[FUSE_RENAME] = {sizeof(fuse_rename_in), 2};
    of[FUSE_LINK] = {sizeof(fuse_link_in), 1};
    of[FUSE_OPEN] = {sizeof(fuse_open_in)};
    of[FUSE_READ] = {sizeof(fuse_read_in)};
    of[FUSE_WRITE] = {sizeof(fuse_write_in)};
    of[FUSE_RELEASE] = {sizeof(fuse_release_in)};
    of[FUSE_FSYNC] = {sizeof(fuse_fsync_in)};
    of[FUSE_SETXATTR] = {FUSE_COMPAT_SETXATTR_IN_SIZE, 1};
    of[FUSE_GETXATTR] = {sizeof(fuse_getxattr_in), 1};
    of[FUSE_LISTXATTR] = {sizeof(fuse_getxattr_in)};
    of[FUSE_REMOVEXATTR] = {0, 1};
    of[FUSE_FLUSH] = {sizeof(fuse_flush_in)};
    of[FUSE_INIT] = {offsetof(fuse_init_in, flags2)};  // before Linux 5.17 that was all
    of[FUSE_OPENDIR] = {sizeof(fuse_open_in)};
    of[FUSE_READDIR] = {sizeof(fuse_read_in)};
    of[FUSE_RELEASEDIR] = {sizeof(fuse_release_in)};
    of[FUSE_FSYNCDIR] = {sizeof(fuse_fsync_in)};
    of[FUSE_GETLK] = of[FUSE_SETLK] = of[FUSE_SETLKW] = {sizeof(fuse_lk_in)};
    of[FUSE_ACCESS] = {sizeof(fuse_access_in)};
    of[FUSE_CREATE] = {sizeof(fuse_create_in), 1};
    of[FUSE_INTERRUPT] = {sizeof(fuse_interrupt_in)};
    of[FUSE_BMAP] = {sizeof(fuse_bmap_in)};
    of[FUSE_IOCTL] = {sizeof(fuse_ioctl_in)};
    of[FUSE_POLL] = {sizeof(fuse_poll_in)};
    of[FUSE_NOTIFY_REPLY] = {sizeof(fuse_notify_retrieve_in)};
    of[FUSE_BATCH_FORGET] = {sizeof(fuse_batch_forget_in)};
    of[FUSE_FALLOCATE] = {sizeof(fuse_fallocate_in)};
    of[FUSE_READDIRPLUS] = {sizeof(fuse_read_in)};
    of[FUSE_RENAME2] = {sizeof(fuse_rename2_in), 2};
    of[FUSE_LSEEK] = {sizeof(fuse_lseek_in)};
    of[FUSE_COPY_FILE_RANGE] = {sizeof(fuse_copy_file_range_in)};
    of[FUSE_SETUPMAPPING] = {sizeof(fuse_setupmapping_in)};
    of[FUSE_REMOVEMAPPING] = {sizeof(fuse_removemapping_in)};
    of[FUSE_SYNCFS] = {sizeof(fuse_syncfs_in)};
    of[tmpfile_opcode] = {sizeof(fuse_create_in), 1};
    of[statx_opcode] = {statx_in_size};
    of[copy_file_range_64_opcode] = {sizeof(fuse_copy_file_range_in)};
    return of;
}();

// The calls of lsattr(1), chattr(1) and project quotas (linux/fs.h).
constexpr std::array<std::uint32_t, 4> file_attribute_ioctls{FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_FSGETXATTR,
                                                             FS_IOC_FSSETXATTR};

// How many bytes a message says follow its struct and its names.
std::uint64_t announced(const Message& message) {
    switch (message.header().opcode) {
        case FUSE_INIT:
            return message.body_as<std::array<std::uint32_t, 4>>()->at(3) & FUSE_INIT_EXT
                       ? sizeof(fuse_init_in) - offsetof(fuse_init_in, flags2)
                       : 0;
        case FUSE_WRITE:
            return message.body_as<fuse_write_in>()->size;
        case FUSE_SETXATTR:
            return message.body_as<std::array<std::uint32_t, 2>>()->at(0);
        case FUSE_IOCTL:
            return message.body_as<fuse_ioctl_in>()->in_size;
        case FUSE_BATCH_FORGET:
            return message.body_as<fuse_batch_forget_in>()->count * std::uint64_t{sizeof(fuse_forget_one)};
        default:
            return 0;
    }
}

}  // namespace

std::optional<Message> Message::parse(Bytes bytes) {
    if (bytes.size() < sizeof(fuse_in_header)) return std::nullopt;
    return Message(bytes);
}

bool Message::is_complete() const {
    if (header_.len != bytes_.size()) return false;
    if (header_.opcode >= forms.size()) return true;  // libfuse knows no such opcode, and does not look
    const Form& form = forms[header_.opcode];
    Bytes rest = body();
    if (rest.size() < form.size) return false;
    rest = rest.subspan(form.size);
    for (int name = 0; name < form.names; ++name) {
        const auto end = std::ranges::find(rest, std::byte{0});
        if (end == rest.end()) return false;
        rest = rest.subspan(static_cast<std::size_t>(end - rest.begin()) + 1);
    }
    return rest.size() >= announced(*this);
}

bool Message::is_foreign_ioctl() const {
    if (header_.opcode != FUSE_IOCTL) return false;
    const std::uint32_t cmd = body_as<fuse_ioctl_in>()->cmd;
    return std::ranges::find(file_attribute_ioctls, cmd) == file_attribute_ioctls.end();
}

bool Message::has_reply() const {
    switch (header_.opcode) {
        case FUSE_FORGET:
        case FUSE_BATCH_FORGET:
        case FUSE_INTERRUPT:
        case FUSE_NOTIFY_REPLY:
            return false;
        default:
            return true;
    }
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
    } else if (header_.opcode == FUSE_OPENDIR) {
        if (auto open = body_as<fuse_open_in>()) return open->flags;
    }
    return 0;
}

Channel::Channel(int device, int scheduler_fd, std::int64_t busy_poll_ns)
    : device_(device), scheduler_fd_(scheduler_fd), window_(busy_poll_ns), idle_since_(now_ns()) {
    set_max_write(first_max_write);
    const int flags = fcntl(device, F_GETFL);
    if (flags == -1 || fcntl(device, F_SETFL, flags | O_NONBLOCK) == -1) {
        throw std::system_error(errno, std::generic_category(), "the FUSE device");
    }
}

Channel::~Channel() { drop_queues(); }

void Channel::make_queues() { queues_ = std::make_shared<Queues>(device_); }

bool Channel::start_queues(std::size_t max_payload, FastPath* fast_path) {
    return queues_->start(max_payload, *this, fast_path);
}

void Channel::push() const {
    if (queues_) queues_->push();
}

void Channel::drop_queues() {
    if (queues_) queues_->stop();
    queues_.reset();
}

void Channel::set_max_write(std::size_t bytes) {
    const std::size_t needed = bytes + overhead;
    if (needed <= capacity_) return;
    buffer_ = std::make_unique_for_overwrite<std::byte[]>(needed);
    capacity_ = needed;
    left_ = false;
}

std::optional<Message> Channel::receive_now(FastPath* fast_path) {
    left_ = false;
    if (queues_ && queues_->started()) return std::nullopt;  // `receive` lets their threads have the state first
    if (handed_over_) idle_since_ = now_ns();
    handed_over_ = false;
    return read_message(fast_path) == Read::message ? hand_over() : std::nullopt;
}

std::optional<Message> Channel::receive(std::int64_t until, FastPath* fast_path) {
    if (queues_ && queues_->started()) return receive_from_queues(until, fast_path);
    std::int64_t looked_at = now_ns();
    for (;;) {
        const Read found = read_message(fast_path);
        if (found == Read::message) return hand_over();
        if (std::exchange(task_runnable_, false)) return std::nullopt;
        const std::int64_t now = now_ns();
        if (found == Read::served) idle_since_ = now;
        if (now - looked_at >= look_ns) {
            if (now >= until || scheduler_must_run()) return std::nullopt;
            looked_at = now;
        }
        if (found == Read::served || now - idle_since_ < window_.ns()) continue;
        if (now >= until || scheduler_fd_ < 0 || !sleep(until - now)) return std::nullopt;
        looked_at = now_ns();
        window_.waited(looked_at - idle_since_);
    }
}

// The same, with queues. There is no polling: what comes here needs Python, or is rare.
std::optional<Message> Channel::receive_from_queues(std::int64_t until, FastPath* fast_path) {
    queues_->state().yield();
    std::int64_t looked_at = 0;
    for (;;) {
        Read found = Read::nothing;
        if (const auto message = queues_->take()) {
            received_ = message->bytes();
            count(*message);
            found = serve(*message, fast_path);
        } else if (std::exchange(device_readable_, false)) {
            found = read_message(fast_path);
            device_readable_ = found != Read::nothing;
        }
        if (found == Read::message) return hand_over();
        if (std::exchange(task_runnable_, false)) return std::nullopt;
        const std::int64_t now = now_ns();
        if (now - looked_at >= look_ns) {
            if (now >= until || scheduler_must_run()) return std::nullopt;
            looked_at = now;
        }
        if (found == Read::nothing && (now >= until || !sleep_beside_queues(until - now))) return std::nullopt;
    }
}

// Sleep until there is a message, while the queues' threads have the state. False if the scheduler must run first.
bool Channel::sleep_beside_queues(std::int64_t ns) {
    if (!queues_->await()) {
        queues_->awake(false);
        return true;
    }
    ++slept_;
    pollfd fds[] = {{device_, POLLIN, 0}, {scheduler_fd_, POLLIN, 0}, {queues_->handed_over_fd(), POLLIN, 0}};
    const timespec timeout{ns / 1'000'000'000, ns % 1'000'000'000};
    queues_->state().unlock();
    const int ready = ppoll(fds, 3, &timeout, nullptr);
    queues_->state().lock();
    queues_->awake(ready > 0 && fds[2].revents != 0);
    device_readable_ = ready > 0 && fds[0].revents != 0;
    return ready > 0 && fds[1].revents == 0;
}

// Sleep until there is a message. False if the scheduler must run first.
bool Channel::sleep(std::int64_t ns) {
    ++slept_;
    awake_ = false;
    pollfd fds[] = {{device_, POLLIN, 0}, {scheduler_fd_, POLLIN, 0}};
    const timespec timeout{ns / 1'000'000'000, ns % 1'000'000'000};
    const int ready = ppoll(fds, 2, &timeout, nullptr);
    return ready > 0 && fds[1].revents == 0;
}

bool Channel::scheduler_must_run() const {
    pollfd fd{scheduler_fd_, POLLIN, 0};
    return scheduler_fd_ >= 0 && poll(&fd, 1, 0) > 0;
}

Channel::Read Channel::read_message(FastPath* fast_path) {
    for (;;) {
        const ssize_t got = read(device_, buffer_.get(), capacity_);
        if (got > 0) {
            received_ = {buffer_.get(), static_cast<std::size_t>(got)};
            const auto message = Message::parse(received_);
            if (!message || !message->is_complete()) {  // no kernel sends such a message
                if (message && message->has_reply()) reply(message->header().unique, -EIO, {});
                continue;
            }
            count(*message);
            if (awake_ && window_.ns() > 0) ++polled_;
            awake_ = true;
            return serve(*message, fast_path);
        }
        switch (got == 0 ? ENODEV : errno) {
            case EINTR:
            case ENOENT:  // the requester went away while the message was being read
                continue;
            case EAGAIN:
                return Read::nothing;
            default:
                throw std::system_error(got == 0 ? ENODEV : errno, std::generic_category(), "the FUSE device");
        }
    }
}

Channel::Read Channel::serve(const Message& message, FastPath* fast_path) {
    if (message.is_foreign_ioctl()) {
        reply(message.header().unique, -ENOTTY, {});
        return Read::served;
    }
    return fast_path != nullptr && fast_path->serve(message, *this) ? Read::served : Read::message;
}

std::optional<Message> Channel::hand_over() {
    handed_over_ = true;
    return Message::parse(received_);
}

Sent Channel::reply(std::uint64_t unique, int error, Bytes body) const {
    fuse_out_header header{};
    header.len = static_cast<std::uint32_t>(sizeof header + body.size());
    header.error = error;
    header.unique = unique;
    const iovec parts[] = {{&header, sizeof header}, {const_cast<std::byte*>(body.data()), body.size()}};
    return send(parts, body.empty() ? 1 : 2);
}

Sent Channel::send(const iovec* parts, int count) const {
    if (queues_) {
        if (const auto sent = queues_->send(parts, count)) return *sent;
    }
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
    if (received_.size() > size) {
        errno = EINVAL;
        return -1;
    }
    std::memcpy(to, received_.data(), received_.size());
    return static_cast<ssize_t>(received_.size());
}

}  // namespace cleanfs
