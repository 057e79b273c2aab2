// The worker: the thread that compresses and stores staged pages, and reclaims memory above the limit.
//
// The worker takes pages from the front of the staging area, in the order of the puts. While it compresses
// one without the mutex, a flush or another put may discard that page; then it drops the result. The
// staging area never moves a page, so the worker may read it without the mutex.
//
// Waking the worker is a system call, too much for each put. So the worker wakes when a part of the staging
// area is used. Pages below that mark stay uncompressed, and count against the limit, until more arrive.
#include "zcache.hpp"

#include <pthread.h>
#include <signal.h>

#include <system_error>

namespace zcache {

namespace {

// The worker wakes when this part of the staging area is used.
constexpr std::size_t wake_divisor = 4;

}  // namespace

bool Zcache::work_is_due() const {
    if (!staging_->empty() && (draining_ || staging_->used() >= staging_->capacity() / wake_divisor)) return true;
    return budget_.used > budget_.limit;
}

void Zcache::wake_worker() {
    if (!worker_.joinable()) start_worker();
    worker_wakes_.notify_one();
}

// Started by the first work, not by the constructor: a daemon forks in between.
void Zcache::start_worker() {
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);  // the main thread handles signals
    try {
        worker_ = std::thread([this] { work(); });
        pthread_setname_np(worker_.native_handle(), "zcached");
    } catch (const std::system_error&) {
        // The system has no thread to spare: callers compress their pages themselves.
    }
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
}

void Zcache::stop_worker() {
    if (!worker_.joinable()) return;
    {
        Lock lock(mutex_);
        stopping_ = true;
        worker_wakes_.notify_one();
    }
    worker_.join();
}

void Zcache::work() {
    Lock lock(mutex_);
    while (true) {
        worker_wakes_.wait(lock, [&] { return stopping_ || work_is_due(); });
        if (stopping_) return;
        while (!stopping_ && !staging_->empty()) work_on_front(lock);
        bool nothing_left = budget_.used > budget_.limit && !try_reclaim();
        worker_done_.notify_all();
        if (nothing_left) {
            worker_wakes_.wait(lock, [&] {
                return stopping_ || !staging_->empty() || budget_.used <= budget_.limit;
            });
        }
    }
}

// Compress the page that has waited longest, without the mutex; then store it.
void Zcache::work_on_front(Lock& lock) {
    Staging::Sequence front = staging_->front();
    if (!staging_->at(front).dead()) {
        Bytes page = staging_->at(front).bytes();
        working_ = true;
        lock.unlock();
        Encoded encoded;
        try {
            if (codec_.wants_samples()) codec_.sample(page);
            encoded = encoding_.encode(worker_scratch_, page);
        } catch (const std::bad_alloc&) {
            encoded.refused = true;
        }
        std::size_t scratch_bytes = worker_scratch_.bytes();
        lock.lock();
        working_ = false;
        worker_scratch_bytes_ = scratch_bytes;
        account_overhead();
        if (!staging_->at(front).dead()) store(staging_->at(front).owner, encoded);
    }
    staging_->pop_front();
}

void Zcache::sync() {
    Lock lock(mutex_);
    drain(lock);
    shrink();
}

void Zcache::drain(Lock& lock) {
    while (!staging_->empty() || working_) {
        draining_ = true;
        wake_worker();
        if (worker_.joinable()) worker_done_.wait(lock);
        else work_on_front(lock);
    }
    draining_ = false;
}

}  // namespace zcache
