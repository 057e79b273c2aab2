// Make files durable in threads, which send the replies themselves: FSYNC waits for the disk.
//
// The main thread starts a call and goes on. Nothing of Python is touched here, and no fd but our own: a thread that
// hangs in the source may outlive the channel.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace cleanfs {

class Queues;

class SyncThreads {
public:
    // More calls than these at a time are Python's.
    static constexpr std::size_t max_threads = 16;

    // `queues` may be null. Throws std::system_error.
    SyncThreads(int device, std::shared_ptr<Queues> queues);
    ~SyncThreads();
    SyncThreads(const SyncThreads&) = delete;
    SyncThreads& operator=(const SyncThreads&) = delete;

    // Begin fsync(2), or fdatasync(2), of a file, and reply to request `unique` when it is done. Call `take_done` first.
    // False if nothing was begun: all threads are busy, or there are no more fds or threads to be had.
    bool start(std::uint64_t unique, int fd, bool data_only);

    struct Done {
        std::uint64_t unique;
        bool refused;  // the requester was gone
    };
    // Move the calls that ended since the last call of this to `done`.
    void take_done(std::vector<Done>& done);

private:
    struct State;
    static void serve(std::shared_ptr<State> state);

    std::shared_ptr<State> state_;
};

}  // namespace cleanfs
