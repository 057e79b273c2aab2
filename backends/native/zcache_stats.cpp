// Counters for the operator, and the check that gauges and data structures agree.
//
// The check walks everything under the mutex, in time proportional to the number of pages: it is for tests.
#include "zcache.hpp"

#include <stdexcept>

namespace zcache {

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
        {"ghosts", admission_.capacity()},
        {"obj_count_max", counters_.obj_count_max},
        {"eph_zpages_max", counters_.eph_zpages_max},
        {"evicted_eph_zpages", counters_.evicted_eph_zpages},
        {"evicted_raw_pages", counters_.evicted_raw_pages},
        {"compress_poor", counters_.compress_poor},
        {"failed_eph_puts", counters_.failed_eph_puts},
        {"staging_full", counters_.staging_full},
        {"eph_nonactive_puts_ignored", counters_.eph_nonactive_puts_ignored},
        {"revived_zpages", counters_.revived_zpages},
        {"corrupt_zpages", counters_.corrupt_zpages},
        {"flush_total", counters_.flush_total},
        {"flush_found", counters_.flush_found},
        {"flobj_total", counters_.flobj_total},
        {"flobj_found", counters_.flobj_found},
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
                must(&self->index_.file(file->id) == file, "a file's id leads to another file");
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
                             "a staged page outside the staging area");
                        must(page.owner.file == file->id && page.owner.index == index, "a staged page of another owner");
                        return;
                    }
                    Stored stored = pool.allocator->load(slot.place());
                    must(stored.owner.file == file->id && stored.owner.index == index, "a stored page of another owner");
                    seen.account(stored, slot.kind(), pool.page_size, 1);
                });
                must(pages == file->pages, "a file's page count is wrong");
            }
        }
        must(pool_files == pool.files, "a pool's file count is wrong");
        files += pool_files;
    });
    must(files == index_.files(), "the count of files is wrong");
    must(lent == loans_.count() && lent_bytes == loans_.page_bytes(), "the count of loans is wrong");
    must(lent_bytes <= max_loan_bytes(), "too many loans");
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
