#include "zcache.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstring>
#include <string>
#include <system_error>

#include "log.hpp"
#include "zbud.hpp"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace zcache {

namespace {

// A page that takes more than this part of itself is poor (the kernel zcache's zv_max_zsize).
constexpr std::size_t poor_numerator = 7, poor_denominator = 8;

// Part of the limit that pages on loan may take.
constexpr std::size_t loan_divisor = 8;

// The staging area: a part of the limit, within bounds. The worker wakes when a quarter of it is used:
// waking it is a system call, which is not made for each put.
constexpr std::size_t staging_divisor = 32;
constexpr std::size_t min_staging = 64 << 10;
constexpr std::size_t max_staging = 1 << 20;
constexpr std::size_t wake_divisor = 4;

// Part of the limit that the samples for a dictionary may take while they are collected.
constexpr std::size_t sample_divisor = 8;

constexpr std::uint64_t max_file_bytes = std::uint64_t{1} << 63;
constexpr PageIndex end_of_file = max_file_bytes / min_page_size;

std::uint64_t word_of(Bytes bytes) {
    std::uint64_t word;
    std::memcpy(&word, bytes.data(), sizeof word);
    return word;
}

bool is_same_filled(Bytes page) {
    return std::memcmp(page.data(), page.data() + word_bytes, page.size() - word_bytes) == 0;
}

void fill(MutableBytes page, std::uint64_t word) {
    for (std::size_t at = 0; at < page.size(); at += word_bytes) std::memcpy(page.data() + at, &word, word_bytes);
}

std::uint32_t checksum_of(Bytes bytes) {
    return static_cast<std::uint32_t>(XXH3_64bits(bytes.data(), bytes.size()));
}

std::uint64_t name_hash(const FileKey& key, PageIndex index) {
    std::uint64_t file = XXH3_64bits_withSeed(key.generation.data(), key.generation.size(), key.inode);
    return (file ^ (key.device * 0xC2B2AE3D27D4EB4FULL) ^ index * 0x9E3779B97F4A7C15ULL) *
           0xD6E8FEB86659FD93ULL;
}

std::size_t least_limit(const CodecOptions& codec) {
    switch (codec.method) {
        case Method::none:
        case Method::lz4:
        case Method::lz4hc:
            return min_pool_limit;
        case Method::zstd:
            return (codec.dictionary ? 8 : 4) * min_pool_limit;
    }
    return min_pool_limit;
}

void check_range(PageIndex first, PageIndex count) {
    if (first > end_of_file || count > end_of_file - first) {
        throw std::out_of_range("page index out of range");
    }
}

}  // namespace

Zcache::Zcache(const Options& options)
    : options_(options),
      codec_(options.codec, options.pool_limit / sample_divisor),
      index_(budget_),
      get_scratch_(codec_, Scratch::Use::decompress),
      worker_scratch_(codec_, Scratch::Use::compress),
      inline_scratch_(codec_, Scratch::Use::compress) {
    check_options(options.pool_limit);
    if (options.allocator == AllocatorKind::zbud) {
        if (options.codec.method == Method::none) {
            throw std::invalid_argument("zbud keeps two pages in the room of one: it needs a compression");
        }
        if (options.keep_poor) {
            throw std::invalid_argument("zbud has no room for raw pages: poor pages must be refused");
        }
    }
    budget_.limit = options.pool_limit;
    staging_ = std::make_unique<Staging>(budget_, staging_bytes(options.pool_limit));
    worker_scratch_bytes_ = worker_scratch_.bytes();
    inline_scratch_bytes_ = inline_scratch_.bytes();
    account_overhead();
}

Zcache::~Zcache() {
    if (worker_.joinable()) {
        {
            Lock lock(mutex_);
            stopping_ = true;
            worker_wakes_.notify_one();
        }
        worker_.join();
    }
}

void Zcache::check_options(std::size_t pool_limit) const {
    std::size_t least = least_limit(options_.codec);
    if (pool_limit < least) {
        throw std::invalid_argument("pool limit " + std::to_string(pool_limit) + " is below " +
                                    std::to_string(least) + " bytes, the least with this compression");
    }
}

// -- pools ----------------------------------------------------------------------------------------

int Zcache::init_fs(std::uint64_t page_size) {
    Lock lock(mutex_);
    return new_pool(page_size, std::nullopt);
}

int Zcache::init_shared_fs(const Uuid& uuid, std::uint64_t page_size) {
    Lock lock(mutex_);
    if (std::optional<int> id = index_.find_shared(uuid)) {
        Pool& pool = index_.pool(*id);
        if (pool.page_size != page_size) return -1;
        ++pool.sharers;
        return *id;
    }
    return new_pool(page_size, uuid);
}

int Zcache::new_pool(std::uint64_t page_size, std::optional<Uuid> uuid) {
    if (page_size < min_page_size || page_size > max_page_size || !std::has_single_bit(page_size)) return -1;
    // What two threads need to compress such pages must leave room for some of them.
    std::size_t scratches = worker_scratch_bytes_ + inline_scratch_bytes_;
    std::size_t least = overhead_ - scratches + 2 * codec_.context_bytes(page_size) + staging_->capacity() +
                        page_size / 4 * 5;
    if (least > budget_.limit) return -1;
    auto size = static_cast<std::uint32_t>(page_size);
    return index_.add_pool(size, uuid, &allocator_for(size));
}

Allocator& Zcache::allocator_for(std::uint32_t page_size) {
    if (auto found = allocators_.find(page_size); found != allocators_.end()) return *found->second;
    IndexLink& link = *this;
    std::unique_ptr<Allocator> made;
    if (options_.allocator == AllocatorKind::zbud) {
        made = std::make_unique<ZbudAllocator>(budget_, link, page_size);
    } else {
        made = std::make_unique<LogAllocator>(budget_, link, page_size, options_.checksum);
    }
    return *allocators_.emplace(page_size, std::move(made)).first->second;
}

void Zcache::flush_fs(int id) {
    Lock lock(mutex_);
    Pool& pool = index_.pool(id);
    if (--pool.sharers > 0) return;
    for (File* head : pool.buckets) {
        for (File* file = head; file != nullptr;) {
            File* next = file->next;
            index_.erase_range(file->id, 0, end_of_file, [&](PageIndex, Slot slot) { discard(pool, slot); });
            file = next;
        }
    }
    std::uint32_t page_size = pool.page_size;
    index_.remove_pool(id);
    bool in_use = false;
    index_.for_each_pool([&](const Pool& other) { in_use |= other.page_size == page_size; });
    if (!in_use) {
        allocators_.erase(page_size);
        shrink_scratches();
    }
}

std::uint32_t Zcache::page_size(int pool) {
    Lock lock(mutex_);
    return index_.pool(pool).page_size;
}

// -- get --------------------------------------------------------------------------------------------

std::size_t Zcache::get(int id, const FileKey& key, PageIndex first, std::size_t count, Sink& sink) {
    check_range(first, count);
    Lock lock(mutex_);
    Pool& pool = index_.pool(id);
    std::size_t found = 0;
    for (std::size_t at = 0; at < count; ++at) {
        // Looked up anew for each page: with its last page the file goes.
        File* file = index_.find(pool, key);
        if (file == nullptr) break;
        std::uint64_t left = file->pages;
        for (; at < count; ++at) {
            PageTable::Item* item = Index::find(*file, first + at);
            if (item == nullptr) continue;
            Slot slot = Slot::of_item(*item);
            if (slot.state() == Slot::State::lent) continue;
            if (fetch(*file, first + at, slot, at, sink)) ++found;
            if (--left == 0) break;  // it may be gone
        }
    }
    bound_loans();
    if (budget_.used > budget_.limit) wake_worker();
    return found;
}

// Give one page to the sink, and take it out or mark it as used.
bool Zcache::fetch(File& file, PageIndex index, Slot slot, std::size_t at, Sink& sink) {
    std::byte* to = sink.page(at);
    if (to == nullptr) {
        discard_page(file.id, index);  // it was a miss: it is one from now on
        return false;
    }
    if (!read(file, index, slot, {to, file.pool->page_size})) {
        sink.cancel(at);
        return false;
    }
    PageTable::Item& item = *Index::find(file, index);
    if (!file.pool->is_private()) {
        if (slot.state() == Slot::State::stored) item = slot.with_referenced(true).item();
        return true;
    }
    Token token = loans_.reserve() ? sink.token(at) : no_token;
    if (token != no_token) {
        lend(file, item, index, token);
    } else {
        remember_active(file, index);
        discard_page(file.id, index);
    }
    return true;
}

bool Zcache::borrow(int id, const FileKey& key, PageIndex first, std::size_t count, std::byte* to) {
    check_range(first, count);
    Lock lock(mutex_);
    Pool& pool = index_.pool(id);
    File* file = index_.find(pool, key);
    if (file == nullptr || file->pages < count) return false;
    for (std::size_t at = 0; at < count; ++at) {
        PageTable::Item* item = Index::find(*file, first + at);
        if (item == nullptr || Slot::of_item(*item).state() == Slot::State::lent) return false;
    }
    for (std::size_t at = 0; at < count; ++at) {
        PageTable::Item& item = *Index::find(*file, first + at);
        Slot slot = Slot::of_item(item);
        if (!read(*file, first + at, slot, {to + at * pool.page_size, pool.page_size})) return false;
        if (slot.state() == Slot::State::stored) item = slot.with_referenced(true).item();
    }
    return true;
}

// Copy a page that is there, staged or stored. One that can not be read is discarded.
bool Zcache::read(File& file, PageIndex index, Slot slot, MutableBytes page) {
    if (slot.state() == Slot::State::staged) {
        std::memcpy(page.data(), staging_->at(slot.place()).data, page.size());
    } else if (!decode(file.pool->allocator->load(slot.place()), slot.kind(), page)) {
        ++tally_.corrupt_zpages;
        discard_page(file.id, index);
        return false;
    }
    return true;
}

bool Zcache::decode(const Stored& stored, Kind kind, MutableBytes page) {
    if (options_.checksum && checksum_of(stored.bytes) != stored.checksum) return false;
    switch (kind) {
        case Kind::same:
            if (stored.bytes.size() != word_bytes) return false;
            fill(page, word_of(stored.bytes));
            return true;
        case Kind::raw:
            if (stored.bytes.size() != page.size()) return false;
            std::memcpy(page.data(), stored.bytes.data(), page.size());
            return true;
        case Kind::zpage:
        case Kind::dict_zpage:
            return codec_.decompress(get_scratch_, stored.bytes, kind == Kind::dict_zpage, page);
    }
    return false;
}

void Zcache::lend(const File& file, PageTable::Item& item, PageIndex index, Token token) {
    std::uint32_t size = file.pool->page_size;
    Slot slot = Slot::of_item(item);
    item = Slot::lent(loans_.add(token, slot, {file.id, index}, size)).item();
    budget_.used += size;
    if (slot.state() == Slot::State::staged) ++gauges_.staged_lent;
}

// A page that was of use is not kept: it is welcome when it comes back.
void Zcache::remember_active(const File& file, PageIndex index) {
    if (options_.was_active) ghosts_.remember(name_hash(file.key(), index));
}

// -- put --------------------------------------------------------------------------------------------

void Zcache::put(int id, const FileKey& key, std::span<const Put> pages) {
    Lock lock(mutex_);
    PageIndex end = max_file_bytes / index_.pool(id).page_size;
    for (const Put& page : pages) {
        if (page.index >= end) throw std::out_of_range("page index out of range");
    }
    try {
        for (const Put& page : pages) put_page(lock, id, key, page);
    } catch (...) {
        if (!lock.owns_lock()) lock.lock();
        discard_pages(id, key, pages);  // no older copy of any of them may be found
        throw;
    }
    tally_.obj_count_max = std::max<std::uint64_t>(tally_.obj_count_max, index_.files());
    tally_.eph_zpages_max =
        std::max(tally_.eph_zpages_max, gauges_.pages + gauges_.staged - loans_.count());
    if (work_is_due()) wake_worker();
}

void Zcache::put_page(Lock& lock, int id, const FileKey& key, const Put& page) {
    Pool& pool = index_.pool(id);
    bool known = false;
    if (File* file = index_.find(pool, key)) {
        if (PageTable::Item* item = Index::find(*file, page.index)) {
            if (revive(*item, page.token)) return;
            discard_page(file->id, page.index);  // before anything can fail: put-put-get
            known = true;
        }
    }
    if (options_.was_active && !known && !admit(key, page.index)) return;

    File& file = index_.find_or_add(pool, key);
    FileId file_id = file.id;
    std::optional<Staging::Sequence> sequence =
        staging_->push({file_id, page.index}, {page.data, pool.page_size});
    if (!sequence) {
        index_.drop_if_empty(file_id);
        put_inline(lock, id, key, page);
        return;
    }
    try {
        index_.insert(file, page.index, Slot::staged(*sequence));
    } catch (...) {
        staging_->kill(*sequence);
        index_.drop_if_empty(file_id);
        throw;
    }
    ++gauges_.staged;
}

void Zcache::discard_pages(int id, const FileKey& key, std::span<const Put> pages) {
    Pool& pool = index_.pool(id);
    for (const Put& page : pages) {
        File* file = index_.find(pool, key);
        if (file != nullptr && Index::find(*file, page.index) != nullptr) discard_page(file->id, page.index);
    }
}

// If this is the very page that is on loan, the loan ends and the page is found again.
bool Zcache::revive(PageTable::Item& item, Token token) {
    Slot slot = Slot::of_item(item);
    if (slot.state() != Slot::State::lent || token == no_token) return false;
    auto number = static_cast<Loans::Number>(slot.place());
    if (loans_.at(number).token != token) return false;
    Slot was = end_loan(number).slot;
    item = was.with_referenced(was.state() == Slot::State::stored).item();
    ++tally_.revived_zpages;
    return true;
}

// Whether a page deserves a place in a full pool: it was here before, or offered before.
bool Zcache::admit(const FileKey& key, PageIndex index) {
    if (!nearly_full()) return true;
    if (ghosts_.capacity() < gauges_.pages / 2 || ghosts_.capacity() == 0) {
        ghosts_.resize(std::max<std::size_t>(gauges_.pages, 1024));
        account_overhead();
    }
    std::uint64_t name = name_hash(key, index);
    if (ghosts_.take(name)) return true;
    ghosts_.remember(name);
    ++tally_.eph_nonactive_puts_ignored;
    return false;
}

// The staging area is full: do the worker's work here, which is also what slows the caller down to
// what two threads can compress.
void Zcache::put_inline(Lock& lock, int id, const FileKey& key, const Put& page) {
    ++tally_.staging_full;
    std::uint32_t size = index_.pool(id).page_size;
    lock.unlock();
    std::unique_lock<std::mutex> scratch(inline_mutex_);
    Encoded encoded = encode(inline_scratch_, {page.data, size});
    std::size_t scratch_bytes = inline_scratch_.bytes();
    lock.lock();
    inline_scratch_bytes_ = scratch_bytes;
    account_overhead();
    File& file = index_.find_or_add(index_.pool(id), key);
    Owner owner{file.id, page.index};
    if (Index::find(file, page.index) != nullptr) {  // another caller was here meanwhile: no order is promised
        index_.drop_if_empty(file.id);
        return;
    }
    try {
        index_.insert(file, page.index, Slot::staged(~std::uint64_t{0}));  // for the file to stay
    } catch (...) {
        index_.drop_if_empty(owner.file);
        throw;
    }
    ++gauges_.staged;
    store(owner, encoded);
}

// A page in the form in which it is stored. `bytes` are the scratch's or the page's.
Zcache::Encoded Zcache::encode(Scratch& scratch, Bytes page) const {
    Encoded encoded;
    if (is_same_filled(page)) {
        encoded.kind = Kind::same;
        encoded.bytes = page.first(word_bytes);
    } else if (options_.codec.method == Method::none) {
        encoded.bytes = page;
    } else if (auto compressed =
                   codec_.compress(scratch, page, page.size() * poor_numerator / poor_denominator)) {
        encoded.kind = compressed->with_dictionary ? Kind::dict_zpage : Kind::zpage;
        encoded.bytes = compressed->bytes;
    } else {
        encoded.bytes = page;
        encoded.poor = true;
        encoded.refused = !options_.keep_poor;
    }
    if (options_.checksum && !encoded.refused) encoded.checksum = checksum_of(encoded.bytes);
    return encoded;
}

// Store a page whose slot says that it is staged. If it can not be, it is gone.
void Zcache::store(Owner owner, const Encoded& encoded) {
    if (encoded.poor) ++tally_.compress_poor;
    Allocator& allocator = allocator_of(owner.file);
    std::optional<Location> at;
    if (!encoded.refused) {
        try {
            at = allocator.store({owner, encoded.checksum, encoded.bytes, encoded.poor});
        } catch (const std::bad_alloc&) {
            // The system has no memory: as if there were no room.
        }
    }
    if (!at && !(encoded.poor && encoded.refused)) ++tally_.failed_eph_puts;
    PageTable::Item& item = *Index::find(index_.file(owner.file), owner.index);
    if (!at) {
        discard_page(owner.file, owner.index);
        return;
    }
    Slot slot = Slot::stored(*at, encoded.kind);
    --gauges_.staged;
    if (Slot held = Slot::of_item(item); held.state() == Slot::State::lent) {
        loans_.at(static_cast<Loans::Number>(held.place())).slot = slot;
        --gauges_.staged_lent;
    } else {
        item = slot.item();
    }
    account(allocator.load(*at), encoded.kind, index_.file(owner.file).pool->page_size, 1);
}

// -- flush --------------------------------------------------------------------------------------------

void Zcache::flush_pages(int id, const FileKey& key, PageIndex first, PageIndex stop) {
    Lock lock(mutex_);
    Pool& pool = index_.pool(id);
    ++tally_.flush_total;
    File* file = index_.find(pool, key);
    if (file == nullptr) return;
    index_.erase_range(file->id, first, stop, [&](PageIndex, Slot slot) {
        ++tally_.flush_found;
        discard(pool, slot);
    });
}

void Zcache::flush_inode(int id, const FileKey& key) {
    Lock lock(mutex_);
    Pool& pool = index_.pool(id);
    ++tally_.flobj_total;
    File* file = index_.find(pool, key);
    if (file == nullptr) return;
    ++tally_.flobj_found;
    index_.erase_range(file->id, 0, end_of_file, [&](PageIndex, Slot slot) { discard(pool, slot); });
}

// A slot is about to leave the index: what it stands for goes.
void Zcache::discard(const Pool& pool, Slot slot) {
    if (slot.state() == Slot::State::lent) {
        slot = end_loan(static_cast<Loans::Number>(slot.place())).slot;
    }
    if (slot.state() == Slot::State::staged) {
        --gauges_.staged;
        if (slot.place() != Slot::staged(~std::uint64_t{0}).place()) staging_->kill(slot.place());
        return;
    }
    account(pool.allocator->load(slot.place()), slot.kind(), pool.page_size, -1);
    pool.allocator->release(slot.place());
}

void Zcache::discard_page(FileId id, PageIndex index) {
    File& file = index_.file(id);
    discard(*file.pool, Slot::of_item(*Index::find(file, index)));
    index_.erase(id, index);
}

// -- loans ----------------------------------------------------------------------------------------------

Loans::Loan Zcache::end_loan(Loans::Number number) {
    Loans::Loan loan = loans_.end(number);
    budget_.used -= loan.page_size;
    if (loan.slot.state() == Slot::State::staged) --gauges_.staged_lent;
    return loan;
}

void Zcache::bound_loans() {
    while (loans_.page_bytes() > budget_.limit / loan_divisor) end_oldest_loan();
}

void Zcache::end_oldest_loan() {
    Owner owner = loans_.at(loans_.oldest()).owner;
    remember_active(index_.file(owner.file), owner.index);
    discard_page(owner.file, owner.index);
}

void Zcache::end_loans() {
    Lock lock(mutex_);
    while (!loans_.empty()) end_oldest_loan();
}

void Zcache::take_returned(std::vector<Token>& tokens) {
    Lock lock(mutex_);
    std::vector<Token>& returned = loans_.returned();
    tokens.assign(returned.begin(), returned.end());
    returned.clear();  // keeps its room, which loans rely on
}

// -- what the allocator does on its own -------------------------------------------------------------------

bool Zcache::take_referenced(Owner owner) {
    PageTable::Item& item = *Index::find(index_.file(owner.file), owner.index);
    Slot slot = Slot::of_item(item);
    if (slot.state() == Slot::State::lent) return true;
    item = slot.with_referenced(false).item();
    return slot.referenced();
}

void Zcache::moved(Owner owner, Location to) {
    PageTable::Item& item = *Index::find(index_.file(owner.file), owner.index);
    Slot slot = Slot::of_item(item);
    if (slot.state() == Slot::State::lent) {
        Loans::Loan& loan = loans_.at(static_cast<Loans::Number>(slot.place()));
        loan.slot = loan.slot.with_place(to);
    } else {
        item = slot.with_place(to).item();
    }
}

void Zcache::evicted(Owner owner, std::size_t, bool poor) {
    File& file = index_.file(owner.file);
    Slot slot = Slot::of_item(*Index::find(file, owner.index));
    if (slot.state() == Slot::State::lent) {
        slot = end_loan(static_cast<Loans::Number>(slot.place())).slot;
    }
    account(file.pool->allocator->load(slot.place()), slot.kind(), file.pool->page_size, -1);
    ++(poor ? tally_.evicted_raw_pages : tally_.evicted_eph_zpages);
    remember_active(file, owner.index);
    index_.erase(owner.file, owner.index);
}

// -- limit --------------------------------------------------------------------------------------------------

std::size_t Zcache::pool_limit() const {
    Lock lock(mutex_);
    return budget_.limit;
}

void Zcache::resize(std::size_t pool_limit) {
    check_options(pool_limit);
    Lock lock(mutex_);
    if (staging_bytes(pool_limit) != staging_->capacity()) {
        auto fresh = std::make_unique<Staging>(budget_, staging_bytes(pool_limit));
        drain(lock);
        staging_ = std::move(fresh);
    }
    budget_.limit = pool_limit;
    account_overhead();
    bound_loans();
    for (auto& [page_size, allocator] : allocators_) allocator->resized();
    shrink();
    shrink_tables();
}

// Tables that grew with another limit may be larger than all that this one allows.
void Zcache::shrink_tables() {
    index_.shrink_tables();
    for (auto& [page_size, allocator] : allocators_) allocator->shrink_tables();
    shrink_scratches();
    if (loans_.bytes() > budget_.limit / 32) {
        while (!loans_.empty()) end_oldest_loan();
        loans_.shrink_tables();
    }
    if (ghosts_.bytes() > budget_.limit / 32) ghosts_.resize(0);
    account_overhead();
    shrink();
}

// The contexts of the compressors may be larger than what the pages that are left need.
void Zcache::shrink_scratches() {
    auto shrink = [this](Scratch& scratch, std::size_t& bytes) {
        try {
            scratch.reset(codec_);
        } catch (const std::bad_alloc&) {
            // It stays as it is.
        }
        bytes = scratch.bytes();
    };
    if (!working_) shrink(worker_scratch_, worker_scratch_bytes_);  // else the worker has it
    // Whoever has the other one waits for mutex_, which we hold: try, do not wait.
    if (std::unique_lock<std::mutex> scratch(inline_mutex_, std::try_to_lock); scratch) {
        shrink(inline_scratch_, inline_scratch_bytes_);
    }
    std::size_t bytes = 0;
    shrink(get_scratch_, bytes);
    account_overhead();
}

void Zcache::shrink() {
    while (budget_.used > budget_.limit && reclaim_any()) {
    }
}

// The allocator that has most gives something up.
bool Zcache::reclaim_any() {
    Allocator* largest = largest_allocator();
    if (largest != nullptr && largest->reclaim()) return true;
    if (loans_.empty()) return false;
    end_oldest_loan();
    return true;
}

bool Zcache::reclaim_elsewhere(const Allocator& asking) {
    Allocator* largest = largest_allocator();
    return largest != &asking && largest->bytes() > asking.bytes() && largest->reclaim();
}

Allocator* Zcache::largest_allocator() const {
    auto largest = std::max_element(allocators_.begin(), allocators_.end(), [](const auto& a, const auto& b) {
        return a.second->bytes() < b.second->bytes();
    });
    return largest == allocators_.end() ? nullptr : largest->second.get();
}

bool Zcache::nearly_full() const { return budget_.used > budget_.limit / 8 * 7; }

std::size_t Zcache::staging_bytes(std::size_t pool_limit) const {
    return round_up(std::clamp(pool_limit / staging_divisor, min_staging, max_staging), min_page_size);
}

// Tell the budget of memory that is not a mapping and not a file's.
void Zcache::account_overhead() {
    std::size_t bytes = sizeof *this + codec_.bytes() + worker_scratch_bytes_ +
                        inline_scratch_bytes_ + get_scratch_.bytes() +
                        loans_.bytes() + ghosts_.bytes() + staging_->table_bytes();
    budget_.used += bytes - overhead_;
    overhead_ = bytes;
}

// -- worker ---------------------------------------------------------------------------------------------------

bool Zcache::work_is_due() const {
    if (!staging_->empty() && (draining_ || staging_->used() >= staging_->capacity() / wake_divisor)) return true;
    return budget_.used > budget_.limit;
}

void Zcache::wake_worker() {
    if (!worker_.joinable()) start_worker();
    worker_wakes_.notify_one();
}

// Started when there is something to do first: a daemon forks before that.
void Zcache::start_worker() {
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);  // signals are the main thread's
    try {
        worker_ = std::thread([this] { work(); });
        pthread_setname_np(worker_.native_handle(), "zcached");
    } catch (const std::system_error&) {
        // The system has no thread for us now: callers compress their pages themselves.
    }
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
}

void Zcache::work() {
    Lock lock(mutex_);
    while (true) {
        worker_wakes_.wait(lock, [&] { return stopping_ || work_is_due(); });
        if (stopping_) return;
        while (!stopping_ && !staging_->empty()) work_on_front(lock);
        bool all_given = budget_.used > budget_.limit && !try_reclaim();
        worker_done_.notify_all();
        if (all_given) {
            worker_wakes_.wait(lock, [&] {
                return stopping_ || !staging_->empty() || budget_.used <= budget_.limit;
            });
        }
    }
}

bool Zcache::try_reclaim() {
    try {
        return reclaim_any();
    } catch (const std::bad_alloc&) {
        return false;  // compaction needs memory to free some
    }
}

// Compress and store the page that waits longest, the compressing without the mutex.
void Zcache::work_on_front(Lock& lock) {
    Staging::Sequence front = staging_->front();
    if (!staging_->at(front).dead()) {
        Bytes page = staging_->at(front).bytes();
        working_ = true;
        lock.unlock();
        Encoded encoded;
        try {
            if (codec_.wants_samples()) codec_.sample(page);
            encoded = encode(worker_scratch_, page);
        } catch (const std::bad_alloc&) {
            encoded.refused = true;
        }
        std::size_t scratch_bytes = worker_scratch_.bytes();
        lock.lock();
        working_ = false;
        worker_scratch_bytes_ = scratch_bytes;
        account_overhead();
        if (!staging_->at(front).dead()) store(staging_->at(front).owner, encoded);
    }
    staging_->pop_front();
}

void Zcache::sync() {
    Lock lock(mutex_);
    drain(lock);
    shrink();
}

void Zcache::drain(Lock& lock) {
    while (!staging_->empty() || working_) {
        draining_ = true;
        wake_worker();
        if (worker_.joinable()) worker_done_.wait(lock);
        else work_on_front(lock);
    }
    draining_ = false;
}

// -- books --------------------------------------------------------------------------------------------------------

void Zcache::account(const Stored& stored, Kind kind, std::uint32_t page_size, int sign) {
    auto add = [sign](std::uint64_t& gauge, std::uint64_t n) { sign > 0 ? gauge += n : gauge -= n; };
    add(gauges_.pages, 1);
    add(gauges_.pagebytes, page_size);
    if (kind == Kind::same) {
        add(gauges_.same_filled, 1);
        add(gauges_.zero_filled, word_of(stored.bytes) == 0);
    } else {
        add(gauges_.zbytes, stored.bytes.size());
        add(gauges_.raw, kind == Kind::raw);
    }
}

Counts Zcache::counters() const {
    Lock lock(mutex_);
    Counts counts{
        {"pool_limit", budget_.limit},
        {"pool_used", budget_.used},
        {"obj_count", index_.files()},
        {"eph_zpages", gauges_.pages + gauges_.staged - loans_.count()},
        {"eph_zbytes", gauges_.zbytes},
        {"eph_pagebytes", gauges_.pagebytes},
        {"metadata_bytes", index_.bytes()},
        {"staged_pages", gauges_.staged},
        {"raw_pages", gauges_.raw},
        {"same_filled_pages", gauges_.same_filled},
        {"zero_filled_pages", gauges_.zero_filled},
        {"loaned_zpages", loans_.count()},
        {"dictionary_bytes", codec_.dictionary_bytes()},
        {"ghosts", ghosts_.capacity()},
        {"obj_count_max", tally_.obj_count_max},
        {"eph_zpages_max", tally_.eph_zpages_max},
        {"evicted_eph_zpages", tally_.evicted_eph_zpages},
        {"evicted_raw_pages", tally_.evicted_raw_pages},
        {"compress_poor", tally_.compress_poor},
        {"failed_eph_puts", tally_.failed_eph_puts},
        {"staging_full", tally_.staging_full},
        {"eph_nonactive_puts_ignored", tally_.eph_nonactive_puts_ignored},
        {"revived_zpages", tally_.revived_zpages},
        {"corrupt_zpages", tally_.corrupt_zpages},
        {"flush_total", tally_.flush_total},
        {"flush_found", tally_.flush_found},
        {"flobj_total", tally_.flobj_total},
        {"flobj_found", tally_.flobj_found},
    };
    for (const auto& [page_size, allocator] : allocators_) allocator->count(counts);
    return counts;
}

void Zcache::check() const {
    Lock lock(mutex_);
    auto must = [](bool holds, const char* what) {
        if (!holds) throw std::logic_error(what);
    };
    Gauges seen;
    std::size_t files = 0, lent = 0, lent_bytes = 0;
    auto self = const_cast<Zcache*>(this);
    self->index_.for_each_pool([&](Pool& pool) {
        std::size_t pool_files = 0;
        for (File* head : pool.buckets) {
            for (File* file = head; file != nullptr; file = file->next) {
                ++pool_files;
                std::uint64_t pages = 0;
                must(file->pages > 0, "a file without pages");
                must(&self->index_.file(file->id) == file, "a file's number leads elsewhere");
                file->table.for_each([&](PageIndex index, PageTable::Item item) {
                    ++pages;
                    Slot slot = Slot::of_item(item);
                    if (slot.state() == Slot::State::lent) {
                        const Loans::Loan& loan = self->loans_.at(static_cast<Loans::Number>(slot.place()));
                        must(loan.token != no_token, "a lent page without a loan");
                        must(loan.owner.file == file->id && loan.owner.index == index, "a loan of another page");
                        ++lent;
                        lent_bytes += loan.page_size;
                        slot = loan.slot;
                        if (slot.state() == Slot::State::staged) ++seen.staged_lent;
                    }
                    if (slot.state() == Slot::State::staged) {
                        ++seen.staged;
                        const Staging::Page& page = self->staging_->at(slot.place());
                        must(slot.place() >= staging_->front() && slot.place() < staging_->back(),
                             "a staged page that left the staging area");
                        must(page.owner.file == file->id && page.owner.index == index, "a staged page of another");
                        return;
                    }
                    Stored stored = pool.allocator->load(slot.place());
                    must(stored.owner.file == file->id && stored.owner.index == index, "a stored page of another");
                    ++seen.pages;
                    seen.pagebytes += pool.page_size;
                    if (slot.kind() == Kind::same) {
                        ++seen.same_filled;
                        seen.zero_filled += word_of(stored.bytes) == 0;
                    } else {
                        seen.zbytes += stored.bytes.size();
                        seen.raw += slot.kind() == Kind::raw;
                    }
                });
                must(pages == file->pages, "a file's count of pages is wrong");
            }
        }
        must(pool_files == pool.files, "a pool's count of files is wrong");
        files += pool_files;
    });
    must(files == index_.files(), "the count of files is wrong");
    must(lent == loans_.count() && lent_bytes == loans_.page_bytes(), "the count of loans is wrong");
    must(lent_bytes <= budget_.limit / loan_divisor, "too many loans");
    must(seen.pages == gauges_.pages && seen.staged == gauges_.staged, "the count of pages is wrong");
    must(seen.staged_lent == gauges_.staged_lent, "the count of lent staged pages is wrong");
    must(seen.zbytes == gauges_.zbytes && seen.pagebytes == gauges_.pagebytes, "the count of bytes is wrong");
    must(seen.raw == gauges_.raw && seen.same_filled == gauges_.same_filled &&
             seen.zero_filled == gauges_.zero_filled,
         "the count of raw or same-filled pages is wrong");
    std::size_t mapped = 0;
    for (const auto& [page_size, allocator] : allocators_) mapped += allocator->bytes();
    must(mapped + staging_->capacity() + index_.bytes() + lent_bytes + overhead_ <= budget_.used + 1,
         "the budget misses something");
}

}  // namespace zcache
