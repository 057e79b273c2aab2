// A slot: the 8 bytes that the index holds for a page, its state and its place.
#pragma once

#include <cassert>

#include "types.hpp"

namespace zcache {

class Slot {
public:
    enum class State : std::uint8_t {
        stored,  // compressed, in the allocator; place() is a Location
        staged,  // uncompressed, waiting for the worker; place() is a staging sequence number
        lent,    // handed out by an exclusive get, so no get finds it; place() is a loan number
    };

    static constexpr Slot stored(Location at, Kind kind, bool referenced = false) {
        return Slot(State::stored, kind, referenced, at);
    }
    static constexpr Slot staged(std::uint64_t sequence) {
        return Slot(State::staged, Kind::raw, false, sequence);
    }
    static constexpr Slot lent(std::uint64_t loan) { return Slot(State::lent, Kind::raw, false, loan); }

    static constexpr Slot of_item(std::uint64_t item) { return Slot(item); }
    constexpr std::uint64_t item() const { return item_; }

    constexpr State state() const { return static_cast<State>(item_ >> 62); }
    constexpr Kind kind() const { return static_cast<Kind>(item_ >> 60 & 3); }
    // Used since it was put or last spared: reclaim spares it once more (shared pools, revived loans).
    constexpr bool referenced() const { return item_ >> 59 & 1; }
    constexpr std::uint64_t place() const { return item_ & place_mask; }

    constexpr Slot with_referenced(bool referenced) const {
        return Slot(state(), kind(), referenced, place());
    }
    constexpr Slot with_place(std::uint64_t place) const {
        return Slot(state(), kind(), referenced(), place);
    }

private:
    static constexpr std::uint64_t place_mask = (std::uint64_t{1} << 56) - 1;

    explicit constexpr Slot(std::uint64_t item) : item_(item) {}
    constexpr Slot(State state, Kind kind, bool referenced, std::uint64_t place)
        : item_(static_cast<std::uint64_t>(state) << 62 | static_cast<std::uint64_t>(kind) << 60 |
                static_cast<std::uint64_t>(referenced) << 59 | (place & place_mask)) {}

    std::uint64_t item_;
};

}  // namespace zcache
