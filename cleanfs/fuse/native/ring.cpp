#include "ring.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <system_error>

namespace cleanfs {

namespace {

[[noreturn]] void fail(int error) { throw std::system_error(error, std::generic_category(), "io_uring"); }

}  // namespace

Ring::Ring(unsigned entries) {
    io_uring_params params{};
    // With these, the kernel copies requests only while this thread waits for them, and interrupts nothing.
    params.flags = IORING_SETUP_SQE128 | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_SUBMIT_ALL;
    fd_ = static_cast<int>(syscall(SYS_io_uring_setup, entries, &params));
    if (fd_ < 0) fail(errno);
    if ((params.features & IORING_FEAT_SINGLE_MMAP) == 0) {
        close();
        fail(ENOSYS);
    }
    map(params);
}

Ring::~Ring() { close(); }

void Ring::close() {
    if (sqes_ != nullptr) munmap(sqes_, sqes_size_);
    if (rings_ != nullptr) munmap(rings_, rings_size_);
    ::close(fd_);
}

void Ring::map(const io_uring_params& params) {
    const auto mapped = [&](std::size_t size, off_t offset) -> std::byte* {
        void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, offset);
        if (at != MAP_FAILED) return static_cast<std::byte*>(at);
        const int error = errno;
        close();
        fail(error);
    };
    rings_size_ = std::max(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                           params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    rings_ = mapped(rings_size_, IORING_OFF_SQ_RING);
    sqes_size_ = params.sq_entries * sqe_size;
    sqes_ = mapped(sqes_size_, IORING_OFF_SQES);
    const auto number = [&](std::uint32_t offset) { return reinterpret_cast<unsigned*>(rings_ + offset); };
    sq_head_ = number(params.sq_off.head);
    sq_tail_ = number(params.sq_off.tail);
    sq_entries_ = params.sq_entries;
    sq_mask_ = *number(params.sq_off.ring_mask);
    cq_head_ = number(params.cq_off.head);
    cq_tail_ = number(params.cq_off.tail);
    cq_mask_ = *number(params.cq_off.ring_mask);
    cqes_ = reinterpret_cast<const io_uring_cqe*>(rings_ + params.cq_off.cqes);
    for (unsigned at = 0; at < sq_entries_; ++at) number(params.sq_off.array)[at] = at;
    prepared_ = *sq_tail_;
}

io_uring_sqe& Ring::prepare() {
    if (prepared_ - std::atomic_ref(*sq_head_).load(std::memory_order_acquire) == sq_entries_) submit();
    std::byte* at = sqes_ + (prepared_++ & sq_mask_) * sqe_size;
    std::memset(at, 0, sqe_size);
    return *reinterpret_cast<io_uring_sqe*>(at);
}

int Ring::enter(unsigned wait_for, std::int64_t timeout_ns) {
    const unsigned to_submit = prepared_ - std::atomic_ref(*sq_head_).load(std::memory_order_acquire);
    std::atomic_ref(*sq_tail_).store(prepared_, std::memory_order_release);
    struct {
        std::int64_t seconds, ns;
    } timeout{timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};  // __kernel_timespec
    io_uring_getevents_arg arg{};
    arg.ts = timeout_ns < 0 ? 0 : reinterpret_cast<std::uint64_t>(&timeout);
    const unsigned flags = wait_for > 0 ? IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG : 0;
    const long done = syscall(SYS_io_uring_enter, fd_, to_submit, wait_for, flags, wait_for > 0 ? &arg : nullptr, sizeof arg);
    return done < 0 ? errno : 0;
}

}  // namespace cleanfs
