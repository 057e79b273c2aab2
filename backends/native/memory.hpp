// Anonymous memory straight from the kernel, counted against the budget and left out of core dumps.
//
// Not malloc: an unmapped region returns to the system at once, whatever lies around it, and the bytes
// counted are the bytes that the process has.
#pragma once

#include "types.hpp"

namespace zcache {

class Mapping {
public:
    Mapping() = default;
    // `size` bytes, a multiple of 4096, aligned to `alignment` (a power of two). Throws std::bad_alloc.
    Mapping(Budget& budget, std::size_t size, std::size_t alignment = 4096);
    // The same, populated at once, in huge pages where they fit. For memory that will be filled from end
    // to end, a page fault for each 4 KiB costs more than the filling.
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

// `bytes` rounded up to a multiple of `unit`, a power of two.
constexpr std::size_t round_up(std::size_t bytes, std::size_t unit) {
    return (bytes + unit - 1) & ~(unit - 1);
}

}  // namespace zcache
