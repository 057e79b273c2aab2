#include "memory.hpp"

#include <sys/mman.h>

#include <new>
#include <utility>

namespace zcache {

namespace {

std::byte* map(std::size_t size) {
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    return static_cast<std::byte*>(at);
}

}  // namespace

Mapping::Mapping(Budget& budget, std::size_t size, std::size_t alignment)
    : budget_(&budget), size_(size) {
    if (alignment <= 4096) {
        data_ = map(size);
    } else {
        // The kernel's choice is often aligned already; else map more and trim it.
        data_ = map(size);
        if (reinterpret_cast<std::uintptr_t>(data_) % alignment != 0) {
            munmap(data_, size);
            std::byte* at = map(size + alignment);
            std::size_t skip = -reinterpret_cast<std::uintptr_t>(at) % alignment;
            if (skip != 0) munmap(at, skip);
            data_ = at + skip;
            if (skip != alignment) munmap(data_ + size, alignment - skip);
        }
    }
    madvise(data_, size, MADV_DONTDUMP);
    budget_->used += size;
}

Mapping Mapping::populated(Budget& budget, std::size_t size) {
    constexpr std::size_t huge_page = std::size_t{2} << 20;
    Mapping made(budget, size, size % huge_page == 0 ? huge_page : 4096);
    if (size % huge_page == 0) madvise(made.data_, size, MADV_HUGEPAGE);
    madvise(made.data_, size, MADV_POPULATE_WRITE);  // since Linux 5.14; before, page faults do it
    return made;
}

Mapping::Mapping(Mapping&& other) noexcept
    : budget_(other.budget_),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
    std::swap(budget_, other.budget_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

Mapping::~Mapping() {
    if (data_ == nullptr) return;
    munmap(data_, size_);
    budget_->used -= size_;
}

}  // namespace zcache
