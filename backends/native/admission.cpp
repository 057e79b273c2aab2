#include "admission.hpp"

#include <algorithm>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace zcache {

namespace {

constexpr std::size_t min_history = 1024;

std::uint64_t name_hash(const FileKey& key, PageIndex index) {
    std::uint64_t file = XXH3_64bits_withSeed(key.generation.data(), key.generation.size(), key.inode);
    return (file ^ (key.device * 0xC2B2AE3D27D4EB4FULL) ^ index * 0x9E3779B97F4A7C15ULL) *
           0xD6E8FEB86659FD93ULL;
}

}  // namespace

bool Admission::fit(std::size_t pages) {
    if (ghosts_.capacity() >= pages / 2 && ghosts_.capacity() != 0) return false;
    ghosts_.resize(std::max(pages, min_history));
    return true;
}

bool Admission::admit(const FileKey& key, PageIndex index) {
    std::uint64_t name = name_hash(key, index);
    if (ghosts_.take(name)) return true;
    ghosts_.remember(name);
    return false;
}

void Admission::remember(const FileKey& key, PageIndex index) { ghosts_.remember(name_hash(key, index)); }

}  // namespace zcache
