// How long to poll the FUSE device before going to sleep.
//
// Most of a FUSE round trip is waking a sleeping process. A program that reads in a loop sends its next request some
// microseconds after our reply, so it pays to poll that long before sleeping.
//
// The window is chosen as KVM does for a halted guest (Documentation/virt/kvm/halt-polling.rst): a short wait makes it
// grow, up to the limit; a wait longer than the limit closes it at once. So an idle mount sleeps, and the first request
// after a pause has to wake it.
#pragma once

#include <time.h>

#include <algorithm>
#include <cstdint>

namespace cleanfs {

// CLOCK_MONOTONIC.
inline std::int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * std::int64_t{1'000'000'000} + now.tv_nsec;
}

class Window {
public:
    // The first window after a short wait (KVM's halt_poll_ns_grow_start).
    static constexpr std::int64_t grow_start_ns = 10'000;
    static constexpr std::int64_t grow = 2;
    // The latency that sleeping adds to a wait.
    static constexpr std::int64_t wake_ns = 30'000;

    // Never wider than `limit_ns`; closed for ever if that is 0.
    explicit Window(std::int64_t limit_ns) : limit_ns_(limit_ns) {}

    std::int64_t ns() const { return ns_; }
    // As after some short waits.
    void open() { ns_ = limit_ns_; }
    // Adapt to a message that came after `ns` and that polling, if any, had not found.
    void waited(std::int64_t ns) {
        if (ns > limit_ns_ + wake_ns || ns_ == limit_ns_) {
            ns_ = 0;
        } else {
            ns_ = std::min(std::max(grow * ns_, grow_start_ns), limit_ns_);
        }
    }

private:
    const std::int64_t limit_ns_;
    std::int64_t ns_ = 0;
};

}  // namespace cleanfs
