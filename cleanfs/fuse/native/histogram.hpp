// The histogram of durations of cleanfs/latency.py, which explains the buckets; the tests compare the two.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace cleanfs {

struct Histogram {
    static constexpr std::size_t buckets = 248;
    std::array<std::uint64_t, buckets> counts{};
    std::uint64_t sum_ns = 0;

    void record(std::int64_t duration) {
        const auto ns = static_cast<std::uint64_t>(duration);
        const auto shift = static_cast<unsigned>(std::bit_width(ns >> 3));
        ++counts[std::min<std::size_t>((shift << 2) + (ns >> shift), buckets - 1)];
        sum_ns += ns;
    }

    void add(const Histogram& other) {
        for (std::size_t at = 0; at < buckets; ++at) counts[at] += other.counts[at];
        sum_ns += other.sum_ns;
    }
};

}  // namespace cleanfs
