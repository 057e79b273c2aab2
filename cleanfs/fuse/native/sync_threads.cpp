#include "sync_threads.hpp"

#include <fcntl.h>
#include <linux/fuse.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "queues.hpp"

namespace cleanfs {

struct SyncThreads::State {
    struct Call {
        std::uint64_t unique;
        int fd;  // ours
        bool data_only;
    };

    ~State() {
        for (const Call& call : waiting) close(call.fd);
        close(device);
    }

    // Whether the requester is gone.
    bool refuses(std::uint64_t unique, int error) const {
        fuse_out_header reply{};
        reply.len = sizeof reply;
        reply.error = error;
        reply.unique = unique;
        const iovec part{&reply, sizeof reply};
        if (queues && queues->send(&part, 1)) return false;
        return write(device, &reply, sizeof reply) == -1 && errno == ENOENT;
    }

    int device = -1;  // ours
    std::shared_ptr<Queues> queues;
    std::mutex mutex;
    // Everything below is protected by mutex.
    std::condition_variable wakes;
    std::deque<Call> waiting;
    std::vector<Done> done;  // at most max_threads, as `take_done` is called before each `start`
    std::size_t idle = 0, threads = 0;
    bool stopping = false;
};

SyncThreads::SyncThreads(int device, std::shared_ptr<Queues> queues) : state_(std::make_shared<State>()) {
    state_->queues = std::move(queues);
    state_->device = fcntl(device, F_DUPFD_CLOEXEC, 0);
    if (state_->device == -1) throw std::system_error(errno, std::generic_category(), "the FUSE device");
    state_->done.reserve(max_threads);  // a thread must not fail
}

SyncThreads::~SyncThreads() {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
    state_->wakes.notify_all();
}

bool SyncThreads::start(std::uint64_t unique, int fd, bool data_only) {
    const std::lock_guard lock(state_->mutex);
    if (state_->waiting.size() >= state_->idle) {
        if (state_->threads == max_threads) return false;
        // A new thread inherits the mask: signals are Python's, on the main thread.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            std::thread(serve, state_).detach();
            ++state_->threads;
            ++state_->idle;
        } catch (const std::system_error&) {
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        if (state_->waiting.size() >= state_->idle) return false;
    }
    // Another fd of the same open file: the program's may be closed while a hung call goes on.
    const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own == -1) return false;
    try {
        state_->waiting.push_back({unique, own, data_only});
    } catch (const std::bad_alloc&) {
        close(own);
        return false;
    }
    state_->wakes.notify_one();
    return true;
}

void SyncThreads::take_done(std::vector<Done>& done) {
    const std::lock_guard lock(state_->mutex);
    done.assign(state_->done.begin(), state_->done.end());
    state_->done.clear();
}

void SyncThreads::serve(std::shared_ptr<State> state) {
    std::unique_lock lock(state->mutex);
    for (;;) {
        state->wakes.wait(lock, [&] { return state->stopping || !state->waiting.empty(); });
        if (state->waiting.empty()) return;
        const State::Call call = state->waiting.front();
        state->waiting.pop_front();
        --state->idle;
        lock.unlock();
        const int result = call.data_only ? fdatasync(call.fd) : fsync(call.fd);
        const bool refused = state->refuses(call.unique, result == 0 ? 0 : -errno);
        close(call.fd);
        lock.lock();
        ++state->idle;
        state->done.push_back({call.unique, refused});
    }
}

}  // namespace cleanfs
