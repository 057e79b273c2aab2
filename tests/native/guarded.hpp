// Put memory between two inaccessible pages, because sanitizers do not instrument the compressors.
#pragma once

#include <sys/mman.h>

#include "pages.hpp"

class Guarded {
public:
    // `size` bytes, a multiple of 4096.
    explicit Guarded(std::size_t size) : size_(size) {
        void* at = mmap(nullptr, size + 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        EXPECT(at != MAP_FAILED);
        start_ = static_cast<std::byte*>(at) + 4096;
        EXPECT(mprotect(start_, size, PROT_READ | PROT_WRITE) == 0);
    }
    ~Guarded() { munmap(start_ - 4096, size_ + 8192); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    zcache::MutableBytes bytes() const { return {start_, size_}; }

private:
    std::byte* start_;
    std::size_t size_;
};
