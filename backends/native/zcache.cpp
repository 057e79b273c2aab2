// The contract: pools, get, put, flush; and the loans.
//
// A put can be refused in four places, each of which discards the older copy first:
//
//  * put_page: the cache is nearly full and the page was not seen before (admission.hpp);
//  * Encoding::encode: the page compresses poorly, and poor pages are refused (encoding.hpp);
//  * Allocator::store: there is no room, and none can be made;
//  * anywhere: the system is out of memory.
#include "zcache.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "log.hpp"
#include "zbud.hpp"

namespace zcache {

// -- tunables -----------------------------------------------------------------------------------------

namespace {

// Part of the limit that the samples for a dictionary may take while they are collected.
constexpr std::size_t sample_divisor = 8;

// -- helpers ------------------------------------------------------------------------------------------

constexpr std::uint64_t max_file_bytes = std::uint64_t{1} << 63;
constexpr PageIndex end_of_file = max_file_bytes / min_page_size;

// The slot of a page that put_inline stores without staging it.
constexpr Slot inline_slot = Slot::staged(~std::uint64_t{0});

void check_range(PageIndex first, PageIndex count) {
    if (first > end_of_file || count > end_of_file - first) {
        throw std::out_of_range("page index out of range");
    }
}

}  // namespace

Zcache::Zcache(const Options& options)
    : options_(options),
      codec_(options.codec, options.pool_limit / sample_divisor),
      encoding_(codec_, options.keep_poor, options.checksum),
      index_(budget_),
      get_scratch_(codec_, Scratch::Use::decompress),
      worker_scratch_(codec_, Scratch::Use::compress),
      inline_scratch_(codec_, Scratch::Use::compress) {
    check_limit(options.pool_limit);
    if (options.allocator == AllocatorKind::zbud) {
        if (options.codec.method == Method::none) {
            throw std::invalid_argument("zbud stores two pages in the room of one: it needs a compression");
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

Zcache::~Zcache() { stop_worker(); }

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
    // The compressors of two threads must leave room for some pages of that size.
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
        // Looked up again after each last page: the file leaves the index with it.
        File* file = index_.find(pool, key);
        if (file == nullptr) break;
        std::uint64_t left = file->pages;
        for (; at < count; ++at) {
            PageTable::Item* item = Index::find(*file, first + at);
            if (item == nullptr) continue;
            Slot slot = Slot::of_item(*item);
            if (slot.state() == Slot::State::lent) continue;
            if (fetch(*file, first + at, slot, at, sink)) ++found;
            if (--left == 0) break;  // the file may be gone
        }
    }
    bound_loans();
    if (budget_.used > budget_.limit) wake_worker();
    return found;
}

// Give one page to the sink, then take it out (private pool) or mark it as referenced (shared pool).
bool Zcache::fetch(File& file, PageIndex index, Slot slot, std::size_t at, Sink& sink) {
    std::byte* to = sink.page(at);
    if (to == nullptr) {
        discard_page(file.id, index);  // this get misses, so later ones must
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
    File* file = find_with(pool, key, first, count);
    if (file == nullptr) return false;
    for (std::size_t at = 0; at < count; ++at) {
        PageTable::Item& item = *Index::find(*file, first + at);
        Slot slot = Slot::of_item(item);
        if (!read(*file, first + at, slot, {to + at * pool.page_size, pool.page_size})) return false;
        if (slot.state() == Slot::State::stored) item = slot.with_referenced(true).item();
    }
    return true;
}

bool Zcache::copy_out(int id, const FileKey& key, PageIndex first, std::size_t count, StoredPages& to) {
    check_range(first, count);
    Lock lock(mutex_);
    Pool& pool = index_.pool(id);
    File* file = find_with(pool, key, first, count);
    if (file == nullptr) return false;
    to.clear(pool.page_size);
    for (std::size_t at = 0; at < count; ++at) {
        PageTable::Item& item = *Index::find(*file, first + at);
        Slot slot = Slot::of_item(item);
        if (slot.state() == Slot::State::staged) {
            to.add_staged(staging_->at(slot.place()).bytes());
        } else {
            to.add_stored(slot.kind(), pool.allocator->load(slot.place()));
            item = slot.with_referenced(true).item();
        }
    }
    return true;
}

bool Zcache::decode(StoredPages& pages, std::byte* to) const {
    if (!pages.scratch || !pages.scratch->serves(codec_)) pages.scratch.emplace(codec_, Scratch::Use::decompress);
    for (const StoredPages::Page& page : pages.pages) {
        const Bytes bytes = pages.bytes_of(page);
        if (page.staged) {
            std::memcpy(to, bytes.data(), bytes.size());
        } else if (!encoding_.decode(*pages.scratch, {{}, page.checksum, bytes}, page.kind, {to, pages.page_size})) {
            return false;
        }
        to += pages.page_size;
    }
    return true;
}

// The file, if a get would find all pages of the range.
File* Zcache::find_with(Pool& pool, const FileKey& key, PageIndex first, std::size_t count) {
    File* file = index_.find(pool, key);
    if (file == nullptr || file->pages < count) return nullptr;
    for (std::size_t at = 0; at < count; ++at) {
        PageTable::Item* item = Index::find(*file, first + at);
        if (item == nullptr || Slot::of_item(*item).state() == Slot::State::lent) return nullptr;
    }
    return file;
}

std::size_t Zcache::missing(int id, const FileKey& key, PageIndex first, std::size_t count) {
    check_range(first, count);
    Lock lock(mutex_);
    File* file = index_.find(index_.pool(id), key);
    if (file == nullptr) return count;
    std::size_t missing = 0;
    for (std::size_t at = 0; at < count; ++at) {
        PageTable::Item* item = Index::find(*file, first + at);
        if (item == nullptr || Slot::of_item(*item).state() == Slot::State::lent) ++missing;
    }
    return missing;
}

// Copy a page that is staged or stored. A page that cannot be decoded is discarded.
bool Zcache::read(File& file, PageIndex index, Slot slot, MutableBytes page) {
    if (slot.state() == Slot::State::staged) {
        std::memcpy(page.data(), staging_->at(slot.place()).data, page.size());
    } else if (!encoding_.decode(get_scratch_, file.pool->allocator->load(slot.place()), slot.kind(), page)) {
        ++counters_.corrupt_zpages;
        discard_page(file.id, index);
        return false;
    }
    return true;
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
        discard_pages(id, key, pages);  // no older copy of any page may be found: put-put-get
        throw;
    }
    counters_.obj_count_max = std::max<std::uint64_t>(counters_.obj_count_max, index_.files());
    counters_.eph_zpages_max =
        std::max(counters_.eph_zpages_max, gauges_.pages + gauges_.staged - loans_.count());
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

// Whether to accept the page: any page while there is room to spare, else only one that was seen before.
bool Zcache::admit(const FileKey& key, PageIndex index) {
    if (!nearly_full()) return true;
    if (admission_.fit(gauges_.pages)) account_overhead();
    if (admission_.admit(key, index)) return true;
    ++counters_.eph_nonactive_puts_ignored;
    return false;
}

// The staging area is full: compress and store the page in the calling thread. This also slows the
// caller down to what two threads can compress.
void Zcache::put_inline(Lock& lock, int id, const FileKey& key, const Put& page) {
    ++counters_.staging_full;
    std::uint32_t size = index_.pool(id).page_size;
    lock.unlock();
    std::unique_lock<std::mutex> scratch(inline_mutex_);
    Encoded encoded = encoding_.encode(inline_scratch_, {page.data, size});
    std::size_t scratch_bytes = inline_scratch_.bytes();
    lock.lock();
    inline_scratch_bytes_ = scratch_bytes;
    account_overhead();
    File& file = index_.find_or_add(index_.pool(id), key);
    Owner owner{file.id, page.index};
    if (Index::find(file, page.index) != nullptr) {  // another caller put it meanwhile: no order is promised
        index_.drop_if_empty(file.id);
        return;
    }
    try {
        index_.insert(file, page.index, inline_slot);  // so that the file stays in the index
    } catch (...) {
        index_.drop_if_empty(owner.file);
        throw;
    }
    ++gauges_.staged;
    store(owner, encoded);
}

// Store a page whose slot is staged, or lent while staged. A page that cannot be stored is discarded.
void Zcache::store(Owner owner, const Encoded& encoded) {
    if (encoded.poor) ++counters_.compress_poor;
    Allocator& allocator = allocator_of(owner.file);
    std::optional<Location> at;
    if (!encoded.refused) {
        try {
            at = allocator.store({owner, encoded.checksum, encoded.bytes, encoded.poor});
        } catch (const std::bad_alloc&) {
            // The system is out of memory: the same as no room.
        }
    }
    if (!at && !(encoded.poor && encoded.refused)) ++counters_.failed_eph_puts;
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
    gauges_.account(allocator.load(*at), encoded.kind, index_.file(owner.file).pool->page_size, 1);
}

// -- flush --------------------------------------------------------------------------------------------

void Zcache::flush_pages(int id, const FileKey& key, PageIndex first, PageIndex stop) {
    Lock lock(mutex_);
    Pool& pool = index_.pool(id);
    ++counters_.flush_total;
    File* file = index_.find(pool, key);
    if (file == nullptr) return;
    index_.erase_range(file->id, first, stop, [&](PageIndex, Slot slot) {
        ++counters_.flush_found;
        discard(pool, slot);
    });
}

void Zcache::flush_inode(int id, const FileKey& key) {
    Lock lock(mutex_);
    Pool& pool = index_.pool(id);
    ++counters_.flobj_total;
    File* file = index_.find(pool, key);
    if (file == nullptr) return;
    ++counters_.flobj_found;
    index_.erase_range(file->id, 0, end_of_file, [&](PageIndex, Slot slot) { discard(pool, slot); });
}

// Release what a slot refers to; the slot is about to leave the index.
void Zcache::discard(const Pool& pool, Slot slot) {
    if (slot.state() == Slot::State::lent) {
        slot = end_loan(static_cast<Loans::Number>(slot.place())).slot;
    }
    if (slot.state() == Slot::State::staged) {
        --gauges_.staged;
        if (slot.place() != inline_slot.place()) staging_->kill(slot.place());
        return;
    }
    gauges_.account(pool.allocator->load(slot.place()), slot.kind(), pool.page_size, -1);
    pool.allocator->release(slot.place());
}

void Zcache::discard_page(FileId id, PageIndex index) {
    File& file = index_.file(id);
    discard(*file.pool, Slot::of_item(*Index::find(file, index)));
    index_.erase(id, index);
}

// -- loans ----------------------------------------------------------------------------------------------

void Zcache::lend(const File& file, PageTable::Item& item, PageIndex index, Token token) {
    std::uint32_t size = file.pool->page_size;
    Slot slot = Slot::of_item(item);
    item = Slot::lent(loans_.add(token, slot, {file.id, index}, size)).item();
    budget_.used += size;
    if (slot.state() == Slot::State::staged) ++gauges_.staged_lent;
}

// If the token is that of the page's loan, end the loan: the page can be found again.
bool Zcache::revive(PageTable::Item& item, Token token) {
    Slot slot = Slot::of_item(item);
    if (slot.state() != Slot::State::lent || token == no_token) return false;
    auto number = static_cast<Loans::Number>(slot.place());
    if (loans_.at(number).token != token) return false;
    Slot was = end_loan(number).slot;
    item = was.with_referenced(was.state() == Slot::State::stored).item();
    ++counters_.revived_zpages;
    return true;
}

Loans::Loan Zcache::end_loan(Loans::Number number) {
    Loans::Loan loan = loans_.end(number);
    budget_.used -= loan.page_size;
    if (loan.slot.state() == Slot::State::staged) --gauges_.staged_lent;
    return loan;
}

void Zcache::bound_loans() {
    while (loans_.page_bytes() > max_loan_bytes()) end_oldest_loan();
}

void Zcache::end_oldest_loan() {
    Owner owner = loans_.at(loans_.oldest()).owner;
    remember_active(index_.file(owner.file), owner.index);
    discard_page(owner.file, owner.index);
}

// A page that was of use leaves the cache: admit it when it comes back.
void Zcache::remember_active(const File& file, PageIndex index) {
    if (options_.was_active) admission_.remember(file.key(), index);
}

void Zcache::end_loans() {
    Lock lock(mutex_);
    while (!loans_.empty()) end_oldest_loan();
}

void Zcache::take_returned(std::vector<Token>& tokens) {
    Lock lock(mutex_);
    std::vector<Token>& returned = loans_.returned();
    tokens.assign(returned.begin(), returned.end());
    returned.clear();  // keeps its capacity, which Loans::reserve() has set aside
}

// -- what the allocators report (IndexLink) -------------------------------------------------------------------

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
    gauges_.account(file.pool->allocator->load(slot.place()), slot.kind(), file.pool->page_size, -1);
    ++(poor ? counters_.evicted_raw_pages : counters_.evicted_eph_zpages);
    remember_active(file, owner.index);
    index_.erase(owner.file, owner.index);
}

}  // namespace zcache
