// The engine's statistics: gauges, which check() recomputes, and counters, which only grow.
//
// Names are those of the kernel's zcache where it had them. What the allocators count, they report
// themselves (Allocator::count).
#pragma once

#include <cstdint>

#include "allocator.hpp"
#include "encoding.hpp"

namespace zcache {

struct Gauges {
    std::uint64_t pages = 0;  // stored, on loan or not
    std::uint64_t zbytes = 0, pagebytes = 0;
    std::uint64_t raw = 0, same_filled = 0, zero_filled = 0;
    std::uint64_t staged = 0, staged_lent = 0;

    // A page comes to be stored (sign 1) or ceases to be (sign -1).
    void account(const Stored& stored, Kind kind, std::uint32_t page_size, int sign) {
        auto add = [sign](std::uint64_t& gauge, std::uint64_t n) { sign > 0 ? gauge += n : gauge -= n; };
        add(pages, 1);
        add(pagebytes, page_size);
        if (kind == Kind::same) {
            add(same_filled, 1);
            add(zero_filled, first_word(stored.bytes) == 0);
        } else {
            add(zbytes, stored.bytes.size());
            add(raw, kind == Kind::raw);
        }
    }
};

struct Counters {
    std::uint64_t obj_count_max = 0, eph_zpages_max = 0;
    std::uint64_t evicted_eph_zpages = 0, evicted_raw_pages = 0;
    std::uint64_t compress_poor = 0, failed_eph_puts = 0, staging_full = 0;
    std::uint64_t eph_nonactive_puts_ignored = 0;
    std::uint64_t revived_zpages = 0, corrupt_zpages = 0;
    std::uint64_t flush_total = 0, flush_found = 0, flobj_total = 0, flobj_found = 0;
};

}  // namespace zcache
