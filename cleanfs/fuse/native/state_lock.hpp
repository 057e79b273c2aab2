// The lock of all that requests read and change: the state that Python writes (state.hpp, inode_state.hpp), and the
// caches.
//
// The main thread holds it whenever it runs Python or serves a request, and gives it up only while the channel sleeps.
// So Python needs to know nothing of it, and a request that another thread serves is atomic, as code between two awaits
// is. Other threads hold it for some microseconds each.
//
// Neither side starves: a thread that waits has its turn before the main thread goes on (`yield`), and once the main
// thread wants the lock no other thread begins to.
//
// Order: this lock, then the GIL, then those of a backend. Who holds the GIL never waits for this lock.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

namespace cleanfs {

class StateLock {
public:
    // -- for the main thread --------------------------------------------------------------------------

    void lock() {
        if (mutex_.try_lock()) return;
        main_waits_ = true;
        mutex_.lock();
        main_waits_ = false;
        main_waits_.notify_all();
    }
    void unlock() { mutex_.unlock(); }
    // Let a thread that waits have its turn.
    void yield() {
        if (waiting_ == 0) return;
        const std::uint32_t before = turns_;  // nobody can take a turn yet
        mutex_.unlock();
        turns_.wait(before);
        lock();
    }

    // -- for the others ---------------------------------------------------------------------------------

    class Turn {
    public:
        explicit Turn(StateLock& lock) : lock_(lock) {
            lock_.main_waits_.wait(true);
            if (!lock_.mutex_.try_lock()) {
                ++lock_.waiting_;
                lock_.mutex_.lock();
                --lock_.waiting_;
            }
            ++lock_.turns_;
            lock_.turns_.notify_one();
        }
        ~Turn() { lock_.mutex_.unlock(); }
        Turn(const Turn&) = delete;
        Turn& operator=(const Turn&) = delete;

    private:
        StateLock& lock_;
    };

private:
    std::mutex mutex_;
    std::atomic<bool> main_waits_ = false;
    std::atomic<std::uint32_t> waiting_ = 0;  // for the mutex
    std::atomic<std::uint32_t> turns_ = 0;    // taken
};

}  // namespace cleanfs
