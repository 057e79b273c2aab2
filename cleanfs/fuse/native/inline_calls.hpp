// Calls to the source that may wait, on the main thread (cleanfs.source.io.watched).
#pragma once

#include <sys/resource.h>

#include <cstdint>

#include "busy_poll.hpp"
#include "state.hpp"

namespace cleanfs {

// InlinePolicy's RECENT_SECONDS and SLOW_SECONDS.
constexpr double recent_seconds = 0.1;
constexpr std::int64_t slow_ns = 1'000'000;

inline double seconds(std::int64_t ns) { return static_cast<double>(ns) * 1e-9; }

// How often this thread has slept. Preemption does not count: it is no wait.
inline long sleeps_of_thread() {
    rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nvcsw : 0;
}

// Whether calls are made inline, and one has just returned.
inline bool is_inline(const InlineState& policy, std::int64_t now) {
    return policy.inline_calls && seconds(now) - policy.returned_at < recent_seconds;
}

// An inline call has returned, and may have waited.
inline void note_return(InlineState& policy, std::int64_t began, long sleeps_before) {
    const std::int64_t returned = now_ns();
    policy.returned_at = seconds(returned);
    if (returned - began > slow_ns && sleeps_of_thread() > sleeps_before) {
        policy.waited_seconds = seconds(returned - began);
        policy.inline_calls = false;
    }
}

}  // namespace cleanfs
