// A ring of io_uring(7) with entries of 128 bytes, which uring commands need. One thread makes it and uses it.
//
// Debian 12's liburing is not needed for that: three system calls and two shared arrays are all.
#pragma once

#include <linux/io_uring.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace cleanfs {

class Ring {
public:
    // The calling thread alone may submit. Throws std::system_error.
    explicit Ring(unsigned entries);
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    // A submission queue entry, all zeros. What was prepared before is submitted if there is no room.
    io_uring_sqe& prepare();
    // Submit what was prepared. Returns 0 or an errno.
    int submit() { return enter(0, -1); }
    // The same, and wait for a completion, for at most `timeout_ns` unless that is negative. Returns 0 or an errno; ETIME
    // if none came.
    int submit_and_wait(std::int64_t timeout_ns) { return enter(1, timeout_ns); }

    // Call `completed(user_data, result)` for each completion, and take it from the queue.
    template <class Completed>
    void for_each_completion(Completed&& completed) {
        for (;;) {
            const unsigned head = *cq_head_;
            if (head == std::atomic_ref(*cq_tail_).load(std::memory_order_acquire)) return;
            const io_uring_cqe cqe = cqes_[head & cq_mask_];
            std::atomic_ref(*cq_head_).store(head + 1, std::memory_order_release);
            completed(cqe.user_data, cqe.res);
        }
    }

private:
    static constexpr std::size_t sqe_size = 128;

    void map(const io_uring_params& params);
    void close();
    int enter(unsigned wait_for, std::int64_t timeout_ns);

    int fd_ = -1;
    std::byte *rings_ = nullptr, *sqes_ = nullptr;
    std::size_t rings_size_ = 0, sqes_size_ = 0;
    unsigned *sq_head_ = nullptr, *sq_tail_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
    unsigned sq_entries_ = 0, sq_mask_ = 0, cq_mask_ = 0;
    unsigned prepared_ = 0;  // the tail, with entries that the kernel has not been told of
    const io_uring_cqe* cqes_ = nullptr;
};

}  // namespace cleanfs
