#include "eviction_ring.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace cleanfs {

namespace {

std::byte* map(int fd, std::size_t size, int protection, off_t offset) {
    void* const mapped = mmap(nullptr, size, protection, MAP_SHARED, fd, offset);
    if (mapped == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "cannot map the ring");
    return static_cast<std::byte*>(mapped);
}

}  // namespace

// The consumer's page may be written; the producer's page and the data, which follow it twice, may not.
EvictionRing::EvictionRing(int fd, std::size_t size) : fd_(fd), size_(size) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    consumer_ = reinterpret_cast<std::uint64_t*>(map(fd, page, PROT_READ | PROT_WRITE, 0));
    try {
        pages_ = map(fd, page + 2 * size, PROT_READ, static_cast<off_t>(page));
    } catch (...) {
        munmap(consumer_, page);
        throw;
    }
    producer_ = reinterpret_cast<std::uint64_t*>(pages_);
    data_ = pages_ + page;
    consumed_ = *consumer_;
}

EvictionRing::~EvictionRing() {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    munmap(consumer_, page);
    munmap(pages_, page + 2 * size_);
}

}  // namespace cleanfs
