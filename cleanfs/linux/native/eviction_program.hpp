// Load the program that copies evicted pages (evictions.bpf.c) into the kernel, for one mount.
//
// Nothing is pinned: program, maps and link end with their descriptors, and so with this process.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "eviction_ring.hpp"

struct eviction_program;

namespace cleanfs {

class EvictionProgram {
public:
    // Load and attach it; it is paused. `ring_size` is a power of 2, and at least a page. Throws std::runtime_error, with a
    // reason for the user, if the kernel does not let us.
    explicit EvictionProgram(std::size_t ring_size);
    ~EvictionProgram();
    EvictionProgram(const EvictionProgram&) = delete;
    EvictionProgram& operator=(const EvictionProgram&) = delete;

    EvictionRing& ring() { return *ring_; }
    volatile eviction_settings& settings();
    eviction_counts counts() const;
    // Copy pages of the file system that stat(2) calls `device`. The ring's descriptor is readable when so much is in it.
    void watch(dev_t device, std::size_t wake_bytes);

private:
    struct Destroy {
        void operator()(eviction_program* program) const;
    };

    std::unique_ptr<eviction_program, Destroy> program_;
    std::optional<EvictionRing> ring_;
};

}  // namespace cleanfs
