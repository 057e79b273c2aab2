// Small objects of a few sizes, in slabs: the kernel's kmem_cache, for the nodes of page tables.
//
// A slab is 16 KiB, aligned to its size, and holds objects of one size; a pointer's slab is found by
// masking. Objects have no header. An empty slab goes back to the system, except for a few that are kept
// for the next object of any size: a growing node passes through all sizes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "memory.hpp"

namespace zcache {

class SlabCache {
public:
    // `sizes`: bytes, ascending, multiples of 8.
    SlabCache(Budget& budget, std::vector<std::uint32_t> sizes);
    ~SlabCache();
    SlabCache(const SlabCache&) = delete;
    SlabCache& operator=(const SlabCache&) = delete;

    // Memory for an object of the size class. Throws std::bad_alloc.
    void* allocate(std::size_t size_class);
    void free(void* object) noexcept;
    static std::size_t size_class(const void* object);

    // Bytes of all slabs.
    std::size_t bytes() const { return (slabs_ + empty_.size()) * slab_bytes; }

private:
    static constexpr std::size_t slab_bytes = 16384;
    static constexpr std::size_t max_empty = 8;

    struct Slab;
    struct Class {
        std::uint32_t size = 0;
        std::uint32_t per_slab = 0;
        Slab* partial = nullptr;  // slabs with a free object
    };

    static Slab* slab_of(const void* object);
    void link(Slab* slab);
    void unlink(Slab* slab);

    Budget& budget_;
    std::vector<Class> classes_;
    std::vector<Mapping> empty_;
    std::size_t slabs_ = 0;  // with objects
};

}  // namespace zcache
