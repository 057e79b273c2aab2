#include "index.hpp"

#include <malloc.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <new>
#include <string>
#include <utility>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace zcache {

namespace {

constexpr std::size_t first_buckets = 16;

// Bytes that malloc uses for a file: the block and its size word.
std::size_t malloc_bytes(const File* file) {
    return malloc_usable_size(const_cast<File*>(file)) + sizeof(std::size_t);
}

}  // namespace

Index::Index(Budget& budget) : budget_(budget), slabs_(PageTable::make_slabs(budget)) {}

Index::~Index() {
    for (File* file : files_) {
        if (file == nullptr) continue;
        file->table.erase_range(slabs_, 0, ~PageIndex{0}, [](PageIndex, PageTable::Item) {});
        remove(*file);
    }
    budget_.used -= table_bytes_;
}

int Index::add_pool(std::uint32_t page_size, std::optional<Uuid> uuid, Allocator* allocator) {
    Pool pool;
    pool.page_size = page_size;
    pool.uuid = uuid;
    pool.allocator = allocator;
    pool.buckets.resize(first_buckets);
    pools_.emplace(next_pool_, std::move(pool));
    bucket_count_ += first_buckets;
    account_tables();
    return next_pool_++;
}

std::optional<int> Index::find_shared(const Uuid& uuid) const {
    for (const auto& [id, pool] : pools_) {
        if (pool.uuid == uuid) return id;
    }
    return std::nullopt;
}

Pool& Index::pool(int id) {
    auto found = pools_.find(id);
    if (found == pools_.end()) throw UnknownPool("no pool " + std::to_string(id));
    return found->second;
}

void Index::remove_pool(int id) {
    bucket_count_ -= pool(id).buckets.size();
    pools_.erase(id);
    account_tables();
}

std::uint32_t Index::hash(const FileKey& key) {
    std::uint64_t h = XXH3_64bits_withSeed(key.generation.data(), key.generation.size(), key.inode);
    h = (h ^ key.inode ^ key.device << 32) * 0x9E3779B97F4A7C15ULL;
    return static_cast<std::uint32_t>(h >> 32);
}

File* Index::find(const Pool& pool, const FileKey& key) const {
    std::uint32_t wanted = hash(key);
    for (File* file = *bucket(pool, wanted); file != nullptr; file = file->next) {
        if (file->hash == wanted && file->key() == key) return file;
    }
    return nullptr;
}

File** Index::bucket(const Pool& pool, std::uint32_t hash) const {
    return const_cast<File**>(&pool.buckets[hash & (pool.buckets.size() - 1)]);
}

File& Index::find_or_add(Pool& pool, const FileKey& key) {
    if (File* found = find(pool, key)) return *found;
    if (pool.files >= pool.buckets.size()) rehash(pool, 2 * pool.buckets.size());
    if (free_ids_.empty()) {
        files_.push_back(nullptr);
        free_ids_.reserve(files_.capacity());  // so that remove() cannot fail
        free_ids_.push_back(static_cast<FileId>(files_.size() - 1));
    }

    void* memory = std::malloc(sizeof(File) + key.generation.size());
    if (memory == nullptr) throw std::bad_alloc();
    auto* file = new (memory) File;
    file->pool = &pool;
    file->device = key.device;
    file->inode = key.inode;
    file->hash = hash(key);
    file->generation_size = static_cast<std::uint32_t>(key.generation.size());
    std::ranges::copy(key.generation, reinterpret_cast<char*>(file + 1));

    file->id = free_ids_.back();
    free_ids_.pop_back();
    files_[file->id] = file;
    File** head = bucket(pool, file->hash);
    file->next = *head;
    *head = file;
    ++pool.files;
    ++file_count_;
    file_bytes_ += malloc_bytes(file);
    budget_.used += malloc_bytes(file);
    account_tables();
    return *file;
}

void Index::rehash(Pool& pool, std::size_t buckets) {
    std::vector<File*> old(buckets);
    bucket_count_ += buckets - pool.buckets.size();
    std::swap(old, pool.buckets);
    for (File* file : old) {
        while (file != nullptr) {
            File* next = file->next;
            File** head = bucket(pool, file->hash);
            file->next = *head;
            *head = file;
            file = next;
        }
    }
}

void Index::remove(File& file) {
    File** link = bucket(*file.pool, file.hash);
    while (*link != &file) link = &(*link)->next;
    *link = file.next;
    --file.pool->files;
    --file_count_;
    files_[file.id] = nullptr;
    free_ids_.push_back(file.id);
    file_bytes_ -= malloc_bytes(&file);
    budget_.used -= malloc_bytes(&file);
    file.~File();
    std::free(&file);
}

void Index::insert(File& file, PageIndex index, Slot slot) {
    file.table.insert(slabs_, index) = slot.item();
    ++file.pages;
}

void Index::erase(FileId id, PageIndex index) {
    erase_range(id, index, index + 1, [](PageIndex, Slot) {});
}

void Index::drop_if_empty(FileId id) {
    File& of = file(id);
    if (of.pages == 0) remove(of);
}

void Index::shrink_tables() {
    for (auto& [id, pool] : pools_) {
        std::size_t enough = std::max(std::bit_ceil(pool.files + 1), first_buckets);
        if (enough < pool.buckets.size()) rehash(pool, enough);
    }
    while (files_.size() > 1 && files_.back() == nullptr) files_.pop_back();
    std::erase_if(free_ids_, [&](FileId id) { return id >= files_.size(); });
    files_.shrink_to_fit();
    // A new vector instead of shrink_to_fit: remove() relies on the capacity even if this throws.
    std::vector<FileId> free_ids;
    free_ids.reserve(files_.capacity());
    free_ids.assign(free_ids_.begin(), free_ids_.end());
    std::swap(free_ids, free_ids_);
    account_tables();
}

void Index::account_tables() {
    std::size_t bytes = files_.capacity() * sizeof(File*) + free_ids_.capacity() * sizeof(FileId) +
                        bucket_count_ * sizeof(File*);
    budget_.used += bytes - table_bytes_;
    table_bytes_ = bytes;
}

}  // namespace zcache
