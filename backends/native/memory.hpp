// Anonymous memory straight from the kernel, counted against the budget and left out of core dumps.
//
// Not from malloc: a mapping goes back to the system at once when it is dropped, whatever lies
// around it, and what is counted is what the process has.
#pragma once

#include "types.hpp"

namespace zcache {

class Mapping {
public:
    Mapping() = default;
    // `size` bytes, a multiple of 4096, aligned to `alignment` (a power of two). Throws std::bad_alloc.
    Mapping(Budget& budget, std::size_t size, std::size_t alignment = 4096);
    // The same, and all of it is in RAM at once, in huge pages where they fit: for memory that is going
    // to be filled from end to end, a fault for each 4 KiB costs more than what is done with them.
    static Mapping populated(Budget& budget, std::size_t size);
    Mapping(Mapping&& other) noexcept;
    Mapping& operator=(Mapping&& other) noexcept;
    ~Mapping();

    std::byte* data() const { return data_; }
    std::size_t size() const { return size_; }
    explicit operator bool() const { return data_ != nullptr; }

private:
    Budget* budget_ = nullptr;
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

// `bytes` up to the next multiple of `unit`, a power of two.
constexpr std::size_t round_up(std::size_t bytes, std::size_t unit) {
    return (bytes + unit - 1) & ~(unit - 1);
}

}  // namespace zcache
