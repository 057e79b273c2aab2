// FUSE over io_uring: one queue of the kernel for each processor, and a thread for each queue that serves hits.
//
// The kernel puts a request into a free entry of the queue of the processor that the requester runs on, and wakes the
// thread there. The thread serves what needs no Python, under the state lock (state_lock.hpp); it hands the rest over to
// the main thread. The reply to a request goes back into its entry, and the kernel takes it when the thread says so: only
// the thread may use its ring. FORGET and INTERRUPT, and what the daemon says of its own accord, go through the device
// as without queues.
//
// A request keeps its entry until its reply. So a queue gets more entries as requests need them: sources that hang must
// not make the kernel keep back the requests for the control files.
//
// `send` and `push` are thread-safe; the rest is the main thread's.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "channel.hpp"
#include "state_lock.hpp"

namespace cleanfs {

class FastPath;

class Queues {
public:
    // Make a ring for each processor, each with its thread. Throws std::system_error if that cannot be had.
    explicit Queues(int device);
    ~Queues();
    Queues(const Queues&) = delete;
    Queues& operator=(const Queues&) = delete;

    // Take requests of at most `max_payload` bytes, from the reply to FUSE_INIT on. False if the kernel refused, and sends
    // them to the device instead. `fast_path` may be null. Both outlive the threads. The state is the main thread's from now
    // on: it holds the lock.
    bool start(std::size_t max_payload, Channel& channel, FastPath* fast_path);
    // End the threads. Replies that were sent before have reached the kernel.
    void stop();
    bool started() const { return started_; }
    std::size_t size() const { return workers_.size(); }

    StateLock& state() { return state_; }

    // -- requests for the main thread -----------------------------------------------------------------------

    // The next request that a thread handed over. Its bytes are valid until its reply.
    std::optional<Message> take();
    // An fd that becomes readable when there is one, between `await`, if that returns true, and `awake`.
    int handed_over_fd() const { return handed_over_fd_; }
    // False if there is one already.
    bool await();
    void awake(bool readable);

    // Send a reply to a request that came by a queue; none if it is not known, or has had its reply.
    std::optional<Sent> send(const iovec* parts, int count);
    // Have the kernel take the reply that this thread sent to a request of its own queue.
    void push();

private:
    struct Entry;
    class Worker;

    void hand_over(Entry& entry, const Message& message);
    Entry* release(std::uint64_t unique);

    const int device_;
    Channel* channel_ = nullptr;
    FastPath* fast_path_ = nullptr;
    std::size_t max_payload_ = 0;
    StateLock state_;
    bool started_ = false;

    std::mutex mutex_;
    // Protected by mutex_.
    std::deque<Message> handed_over_;
    std::unordered_map<std::uint64_t, Entry*> in_progress_;  // with the main thread, by unique

    std::atomic<bool> main_waits_ = false;
    int handed_over_fd_ = -1;
    std::vector<std::unique_ptr<Worker>> workers_;  // last, as their threads use all of this
};

}  // namespace cleanfs
