#include "slab.hpp"

#include <cassert>
#include <new>
#include <utility>

namespace zcache {

// The header at the start of a slab. Free objects are chained through their first word. Objects that were
// never handed out are not in the chain, so a new slab touches only the memory that it hands out.
struct SlabCache::Slab {
    Mapping memory;
    Slab* prev = nullptr;
    Slab* next = nullptr;
    void* free = nullptr;
    std::uint32_t size_class = 0;
    std::uint32_t used = 0;
    std::uint32_t fresh = 0;  // objects from here on were never handed out
};

SlabCache::SlabCache(Budget& budget, std::vector<std::uint32_t> sizes) : budget_(budget) {
    empty_.reserve(max_empty);  // so that free() cannot fail
    for (std::uint32_t size : sizes) {
        auto per_slab = static_cast<std::uint32_t>((slab_bytes - sizeof(Slab)) / size);
        classes_.push_back({size, per_slab, nullptr});
    }
}

SlabCache::~SlabCache() { assert(slabs_ == 0); }

SlabCache::Slab* SlabCache::slab_of(const void* object) {
    return reinterpret_cast<Slab*>(reinterpret_cast<std::uintptr_t>(object) & ~(slab_bytes - 1));
}

std::size_t SlabCache::size_class(const void* object) { return slab_of(object)->size_class; }

void SlabCache::link(Slab* slab) {
    Slab*& head = classes_[slab->size_class].partial;
    slab->prev = nullptr;
    slab->next = head;
    if (head != nullptr) head->prev = slab;
    head = slab;
}

void SlabCache::unlink(Slab* slab) {
    if (slab->prev != nullptr) slab->prev->next = slab->next;
    else classes_[slab->size_class].partial = slab->next;
    if (slab->next != nullptr) slab->next->prev = slab->prev;
}

void* SlabCache::allocate(std::size_t size_class) {
    Class& cls = classes_[size_class];
    Slab* slab = cls.partial;
    if (slab == nullptr) {
        Mapping memory;
        if (empty_.empty()) {
            memory = Mapping(budget_, slab_bytes, slab_bytes);
        } else {
            memory = std::move(empty_.back());
            empty_.pop_back();
        }
        slab = new (memory.data()) Slab;
        slab->memory = std::move(memory);
        slab->size_class = static_cast<std::uint32_t>(size_class);
        link(slab);
        ++slabs_;
    }
    void* object = slab->free;
    if (object != nullptr) {
        slab->free = *static_cast<void**>(object);
    } else {
        object = reinterpret_cast<std::byte*>(slab + 1) + std::size_t{slab->fresh++} * cls.size;
    }
    if (++slab->used == cls.per_slab) unlink(slab);
    return object;
}

void SlabCache::free(void* object) noexcept {
    Slab* slab = slab_of(object);
    if (slab->used == classes_[slab->size_class].per_slab) link(slab);
    *static_cast<void**>(object) = slab->free;
    slab->free = object;
    if (--slab->used == 0) {
        unlink(slab);
        --slabs_;
        Mapping memory = std::move(slab->memory);
        slab->~Slab();
        if (empty_.size() < max_empty) empty_.push_back(std::move(memory));
    }
}

}  // namespace zcache
