// Which reads of one handle stay in the source's page cache for a while, and when they go.
//
// cleanfs/source/drop_behind.py gives the reasons for rules and figures; the tests compare the two.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

namespace cleanfs {

class Stream {
public:
    struct Span {
        std::int64_t offset, length;
    };

    bool lingers(std::int64_t offset, std::int64_t size, std::int64_t file_size) {
        if (offset == 0 && size >= file_size && file_size > 0) return false;  // all that there is to read
        const bool near = stop_ > 0 && (size >= read_ahead ? is_near(offset) : offset == stop_);
        if (near || offset == expected_) return true;
        expected_ = offset + size;
        return false;
    }

    std::optional<Span> passed(std::int64_t offset, std::int64_t size) {
        const std::int64_t start = start_, stop = stop_;
        if (stop == 0 || !is_near(offset)) {  // a new stream
            start_ = offset;
            stop_ = offset + size;
            return stop == 0 ? std::nullopt : std::optional(span(start, stop));
        }
        const std::int64_t oldest = start_ = std::min(start, offset);
        stop_ = std::max(stop, offset + size);
        if (stop_ - start_ <= window) return std::nullopt;
        start_ = stop_ - near_bytes;
        return span(oldest, start_);
    }

    std::optional<Span> rest() const {
        return stop_ == 0 ? std::nullopt : std::optional(span(start_, stop_, ahead));
    }

private:
    static constexpr std::int64_t near_bytes = 4 << 20, read_ahead = 32 << 10, window = 3 * near_bytes;
    static constexpr std::int64_t folio = 2 << 20, ahead = 16 << 20;

    // Offsets may be as large as they get: none of these sums overflows.
    bool is_near(std::int64_t offset) const { return start_ - near_bytes <= offset && offset - stop_ <= near_bytes; }

    static Span span(std::int64_t start, std::int64_t stop, std::int64_t more = 0) {
        const std::int64_t from = std::max(start - folio, std::int64_t{0});
        return {from, stop - from + more};
    }

    std::int64_t start_ = 0, stop_ = 0;  // the range that may be left
    std::int64_t expected_ = 0;          // the end of the last lone read
};

}  // namespace cleanfs
