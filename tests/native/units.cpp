// Test the parts of the engine one by one, each against its simplest model.
#include <algorithm>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <set>

#include "codec.hpp"
#include "ghosts.hpp"
#include "guarded.hpp"
#include "loans.hpp"
#include "log.hpp"
#include "machine.hpp"
#include "page_table.hpp"
#include "slab.hpp"
#include "staging.hpp"
#include "zbud.hpp"

namespace {

using zcache::Budget;
using zcache::Location;
using zcache::Owner;
using zcache::PageIndex;
using zcache::PageTable;

void test_page_table(Random& random) {
    Budget budget;
    {
        zcache::SlabCache slabs = PageTable::make_slabs(budget);
        for (int round = 0; round < 6; ++round) {
            PageTable table;
            std::map<PageIndex, std::uint64_t> model;
            // Dense; clustered; and anywhere in the range of a table.
            auto index = [&]() -> PageIndex {
                switch (random.below(round < 2 ? 1 : 3)) {
                    case 0: return random.below(2000);
                    case 1: return (random.below(20) << 47) + random.below(round % 2 == 0 ? 4000 : 70);
                    default: return random.next() >> (10 + random.below(54));
                }
            };
            std::uint64_t inserts = round % 3 == 0 ? 3 : 5;
            for (int step = 0; step < 30000; ++step) {
                PageIndex at = index();
                std::uint64_t choice = random.below(10);
                if (choice < inserts) {
                    PageTable::Item& item = table.insert(slabs, at);
                    EXPECT(item == (model.contains(at) ? model[at] : 0));
                    item = model[at] = random.next() | 1;
                } else if (choice < 9) {
                    EXPECT(table.erase(slabs, at) == (model.erase(at) == 1));
                } else if (random.below(10) == 0) {
                    PageIndex stop = random.below(4) == 0 ? ~PageIndex{0} : at + random.below(5000);
                    if (random.below(8) == 0) std::swap(at, stop);
                    auto expected = model.lower_bound(at);
                    table.erase_range(slabs, at, stop, [&](PageIndex erased, PageTable::Item item) {
                        EXPECT(expected != model.end() && expected->first == erased && expected->second == item);
                        EXPECT(erased < stop);
                        expected = model.erase(expected);
                    });
                    EXPECT(at >= stop || expected == model.end() || expected->first >= stop);
                }
                PageTable::Item* found = table.find(at);
                EXPECT((found != nullptr) == model.contains(at));
                EXPECT(found == nullptr || *found == model[at]);
                EXPECT(table.empty() == model.empty());
                if (step % 1000 != 0) continue;
                auto expected = model.begin();
                table.for_each([&](PageIndex seen, PageTable::Item item) {
                    EXPECT(expected != model.end() && expected->first == seen && expected->second == item);
                    ++expected;
                });
                EXPECT(expected == model.end());
                EXPECT(budget.used == slabs.bytes());
            }
            table.erase_range(slabs, 0, ~PageIndex{0}, [](PageIndex, PageTable::Item) {});
            EXPECT(table.empty());
        }
    }
    EXPECT(budget.used == 0);
}

void test_slab(Random& random) {
    Budget budget;
    {
        std::vector<std::uint32_t> sizes{16, 24, 40, 520};
        zcache::SlabCache slabs(budget, sizes);
        std::vector<std::pair<std::uint64_t*, std::uint64_t>> held;  // with the value of its first word
        auto size_of = [&](void* object) { return sizes[zcache::SlabCache::size_class(object)]; };
        auto check_and_free = [&](std::size_t at) {
            auto [object, tag] = held[at];
            for (std::size_t i = 0; i < size_of(object) / 8; ++i) EXPECT(object[i] == tag + i);
            slabs.free(object);
            held[at] = held.back();
            held.pop_back();
        };
        for (int step = 0; step < 100000; ++step) {
            if (held.empty() || random.below(100) < (step / 10000 % 2 == 0 ? 70 : 30)) {
                std::size_t wanted = random.below(sizes.size());
                auto* object = static_cast<std::uint64_t*>(slabs.allocate(wanted));
                EXPECT(zcache::SlabCache::size_class(object) == wanted);
                std::uint64_t tag = random.next();
                for (std::size_t i = 0; i < sizes[wanted] / 8; ++i) object[i] = tag + i;
                held.emplace_back(object, tag);
            } else {
                check_and_free(random.below(held.size()));
            }
            EXPECT(budget.used == slabs.bytes());
        }
        while (!held.empty()) check_and_free(held.size() - 1);
    }
    EXPECT(budget.used == 0);
}

void test_staging(Random& random) {
    Budget budget;
    {
        zcache::Staging staging(budget, 200000);
        struct Known {
            zcache::Staging::Sequence sequence;
            Content content;
            Owner owner;
            std::size_t size;
        };
        std::deque<Known> model;
        std::uint64_t pushed = 0, full = 0;
        for (std::uint64_t step = 1; step <= 20000; ++step) {
            if (random.below(5) < 3) {
                std::size_t size = std::size_t{4096} << random.below(random.below(100) == 0 ? 9 : 4);
                std::vector<std::byte> page(size);
                Content content{Content::noise, 0, step};
                fill_page(content, page);
                Owner owner{static_cast<zcache::FileId>(step), step * 7};
                auto sequence = staging.push(owner, page);
                EXPECT(sequence || !model.empty() || size > staging.capacity());
                if (sequence) model.push_back({*sequence, content, owner, size});
                ++(sequence ? pushed : full);
            } else if (!model.empty() && random.below(4) == 0) {
                Known& known = model[random.below(model.size())];
                staging.kill(known.sequence);
                known.owner.file = zcache::no_file;
            } else if (!model.empty()) {
                const Known& known = model.front();
                EXPECT(staging.front() == known.sequence);
                const zcache::Staging::Page& page = staging.at(known.sequence);
                EXPECT(page.owner.file == known.owner.file && page.owner.index == known.owner.index);
                EXPECT(page.dead() == (known.owner.file == zcache::no_file));
                EXPECT(page.bytes().size() == known.size && is_page(known.content, page.bytes()));
                staging.pop_front();
                model.pop_front();
            }
            EXPECT(staging.empty() == model.empty() && staging.back() - staging.front() == model.size());
            EXPECT(staging.used() <= staging.capacity() && (!model.empty() || staging.used() == 0));
            EXPECT(budget.used == staging.capacity());
        }
        EXPECT(pushed > 1000 && full > 100);
    }
    EXPECT(budget.used == 0);
}

void test_ghosts(Random& random) {
    zcache::Ghosts ghosts;
    EXPECT(!ghosts.take(1) && ghosts.capacity() == 0);
    ghosts.remember(1);
    for (std::size_t names : {1U, 8U, 9U, 1000U}) {
        ghosts.resize(names);
        EXPECT(ghosts.capacity() >= names && ghosts.capacity() < 2 * names + 8);
        std::size_t sets = ghosts.capacity() / 8;
        // The last eight tags of each set.
        std::vector<std::list<std::uint64_t>> model(sets);
        auto tag = [](std::uint64_t hash) { return hash >> 32 | 1; };
        std::vector<std::uint64_t> hashes;
        for (int i = 0; i < 3000; ++i) hashes.push_back(random.next());
        for (int step = 0; step < 30000; ++step) {
            std::uint64_t hash = hashes[random.below(hashes.size())];
            std::list<std::uint64_t>& set = model[hash & (sets - 1)];
            auto known = std::find(set.begin(), set.end(), tag(hash));
            bool was_known = known != set.end();
            if (was_known) set.erase(known);
            if (random.below(2) == 0) {
                ghosts.remember(hash);
                set.push_front(tag(hash));
                if (set.size() > 8) set.pop_back();
            } else {
                EXPECT(ghosts.take(hash) == was_known);
            }
        }
    }
    ghosts.resize(0);
    EXPECT(ghosts.bytes() == 0);
}

void test_loans(Random& random) {
    zcache::Loans loans;
    std::list<std::pair<zcache::Loans::Number, zcache::Token>> model;  // oldest first
    std::multiset<zcache::Token> returned;
    zcache::Token next = 1;
    for (int step = 0; step < 30000; ++step) {
        if (random.below(100) < (step / 3000 % 2 == 0 ? 60U : 40U)) {
            EXPECT(loans.reserve());
            if (random.below(4) == 0) continue;  // a reservation may stay unused
            auto number = loans.add(next, zcache::Slot::stored(next, zcache::Kind::zpage), {1, next}, 4096);
            model.emplace_back(number, next++);
        } else if (!model.empty()) {
            std::uint64_t older = random.below(std::min<std::size_t>(model.size(), 50));
            auto which = std::next(model.begin(), static_cast<std::ptrdiff_t>(older));
            EXPECT(loans.at(which->first).token == which->second);
            zcache::Loans::Loan loan = loans.end(which->first);
            EXPECT(loan.token == which->second && loan.owner.index == which->second && loan.page_size == 4096);
            returned.insert(which->second);
            model.erase(which);
        }
        EXPECT(loans.count() == model.size() && loans.empty() == model.empty());
        EXPECT(loans.page_bytes() == 4096 * model.size());
        EXPECT(model.empty() || loans.oldest() == model.front().first);
        if (random.below(100) != 0) continue;
        EXPECT(std::multiset<zcache::Token>(loans.returned().begin(), loans.returned().end()) == returned);
        loans.returned().clear();
        returned.clear();
    }
}

// A minimal index on top of an allocator.
class FakeIndex final : public zcache::IndexLink {
public:
    struct Known {
        Location at;
        std::uint32_t checksum;
        std::vector<std::byte> bytes;
        bool poor;
        bool referenced = false;
    };
    std::map<std::pair<zcache::FileId, PageIndex>, Known> known;
    std::uint64_t evictions = 0, moves = 0;

    Known& of(Owner owner) {
        auto found = known.find({owner.file, owner.index});
        EXPECT(found != known.end());
        return found->second;
    }
    bool take_referenced(Owner owner) override { return std::exchange(of(owner).referenced, false); }
    void moved(Owner owner, Location to) override {
        of(owner).at = to;
        ++moves;
    }
    void evicted(Owner owner, std::size_t bytes, bool poor) override {
        EXPECT(of(owner).bytes.size() == bytes && of(owner).poor == poor);
        known.erase({owner.file, owner.index});
        ++evictions;
    }
    bool reclaim_elsewhere(const zcache::Allocator&) override { return false; }
};

void check_stored(const zcache::Allocator& allocator, Owner owner, const FakeIndex::Known& known) {
    zcache::Stored stored = allocator.load(known.at);
    EXPECT(known.at < Location{1} << 48);
    EXPECT(stored.owner.file == owner.file && stored.owner.index == owner.index);
    EXPECT(stored.checksum == known.checksum && std::ranges::equal(stored.bytes, known.bytes));
}

enum class Kind { zbud, log, log_with_checksums };

void test_allocator(Random& random, Kind kind, std::uint32_t page_size, std::size_t limit) {
    bool zbud = kind == Kind::zbud;
    Budget budget;
    budget.limit = limit;
    FakeIndex index;
    {
        std::unique_ptr<zcache::Allocator> allocator;
        if (zbud) allocator = std::make_unique<zcache::ZbudAllocator>(budget, index, page_size);
        else allocator = std::make_unique<zcache::LogAllocator>(budget, index, page_size,
                                                                kind == Kind::log_with_checksums);
        PageIndex last_index = (PageIndex{1} << 63) / page_size - 1;
        std::uint64_t stored = 0;
        for (int step = 0; step < 10000; ++step) {
            auto some = [&] {
                Owner owner{static_cast<zcache::FileId>(1 + random.below(3)), random.below(800)};
                auto found = index.known.lower_bound({owner.file, owner.index});
                return found == index.known.end() ? index.known.begin() : found;
            };
            std::uint64_t choice = random.below(100);
            if (choice < 55 || index.known.empty()) {
                Owner owner{static_cast<zcache::FileId>(1 + random.below(3)), random.below(800)};
                if (random.below(8) == 0) owner.index = last_index - owner.index;
                if (index.known.contains({owner.file, owner.index})) continue;
                bool poor = !zbud && random.below(4) == 0;
                std::size_t size = random.below(10) == 0 ? 8 : 1 + random.below(page_size * 7 / 8);
                if (poor) size = page_size;
                std::vector<std::byte> bytes(size);
                for (std::byte& byte : bytes) byte = static_cast<std::byte>(step + (&byte - bytes.data()) / 7);
                auto checksum = kind == Kind::log ? 0 : static_cast<std::uint32_t>(random.next());
                // While the entry is stored, the index knows its owner but no location, like that of a staged page.
                auto at = allocator->store({owner, checksum, bytes, poor});
                if (!at) continue;
                ++stored;
                index.known[{owner.file, owner.index}] = {*at, checksum, std::move(bytes), poor};
            } else if (choice < 75) {
                auto which = some();
                check_stored(*allocator, {which->first.first, which->first.second}, which->second);
                allocator->release(which->second.at);
                index.known.erase(which);
            } else if (choice < 95) {
                auto which = some();
                check_stored(*allocator, {which->first.first, which->first.second}, which->second);
                which->second.referenced = true;
            } else if (choice < 96) {
                std::size_t before = index.known.size();
                bool something = allocator->reclaim();
                EXPECT(something || (before == 0 && allocator->bytes() == 0));
            } else if (random.below(10) == 0) {
                budget.limit = limit / (1 + random.below(4));
                allocator->resized();
                while (budget.used > budget.limit && allocator->reclaim()) {
                }
                EXPECT(budget.used <= budget.limit || index.known.empty());
            }
            EXPECT(allocator->bytes() <= budget.used);
            if (step % 1000 != 0) continue;
            for (const auto& [owner, known] : index.known) {
                check_stored(*allocator, {owner.first, owner.second}, known);
            }
            zcache::Counts counts;
            allocator->count(counts);
            if (zbud) EXPECT(counts["zbud_eph_zpages"] == index.known.size());
        }
        while (allocator->reclaim()) {
        }
        EXPECT(index.known.empty() && allocator->bytes() == 0);
        EXPECT(stored > 500 || page_size > limit / 16);
    }
    EXPECT(budget.used == 0);
}

// For any input, decompression neither writes beyond `out` nor reads beyond `in`.
void test_corruption(Random& random) {
    constexpr std::size_t page_size = 4096;
    Guarded room(1 << 16), out(page_size);
    for (const zcache::CodecOptions& options : {zcache::CodecOptions{zcache::Method::lz4, 1, false},
                                         zcache::CodecOptions{zcache::Method::lz4hc, 9, false},
                                         zcache::CodecOptions{zcache::Method::zstd, 1, false},
                                         zcache::CodecOptions{zcache::Method::zstd, 3, true}}) {
        zcache::Codec codec(options, 256 << 10);
        zcache::Scratch compress(codec, zcache::Scratch::Use::compress);
        zcache::Scratch decompress(codec, zcache::Scratch::Use::decompress);
        std::vector<std::byte> page(page_size);
        // Pages that share much with others but repeat nothing themselves: a dictionary helps.
        constexpr std::size_t piece = 512, pieces = 48;
        std::vector<std::byte> common(piece * pieces);
        for (std::byte& byte : common) byte = static_cast<std::byte>(random.next());
        for (std::uint64_t n = 0; codec.wants_samples(); ++n) {
            EXPECT(n < 1 << 20);
            std::size_t first = random.below(pieces);
            for (std::size_t at = 0; at < page_size; at += piece) {
                std::memcpy(page.data() + at, common.data() + (first + at / piece * 5) % pieces * piece, piece);
            }
            codec.sample(page);
        }
        EXPECT(!options.dictionary || codec.dictionary_bytes() > 0);
        std::uint64_t wrong = 0, short_output = 0;
        for (std::uint64_t n = 0; n < 4000; ++n) {
            Content content{Content::mixed, static_cast<std::uint8_t>(random.below(28)), random.next()};
            fill_page(content, page);
            auto made = codec.compress(compress, page, page_size);
            EXPECT(made);
            std::vector<std::byte> bytes(made->bytes.begin(), made->bytes.end());
            bool with_dictionary = made->with_dictionary;
            EXPECT(with_dictionary == options.dictionary);
            auto give = [&](std::size_t size) {
                // At the end of the accessible memory, or at its start.
                zcache::MutableBytes in = room.bytes();
                in = n % 2 == 0 ? in.last(bytes.size()) : in.first(bytes.size());
                std::ranges::copy(bytes, in.begin());
                zcache::MutableBytes to = out.bytes();
                to = random.below(2) == 0 ? to.last(size) : to.first(size);
                bool right = codec.decompress(decompress, in, with_dictionary, to);
                return right && size == page_size && is_page(content, to);
            };
            EXPECT(give(page_size));
            std::size_t shorter = random.below(page_size);
            short_output += !give(shorter);
            switch (random.below(4)) {
                case 0:  // some bits
                    for (std::uint64_t i = random.below(8) + 1; i > 0; --i) {
                        bytes[random.below(bytes.size())] ^= static_cast<std::byte>(1 << random.below(8));
                    }
                    break;
                case 1:  // truncated
                    bytes.resize(random.below(bytes.size()));
                    break;
                case 2:  // random bytes from some point on
                    for (std::size_t at = random.below(bytes.size()); at < bytes.size(); ++at) {
                        bytes[at] = static_cast<std::byte>(random.next());
                    }
                    break;
                default:  // random, except zstd's magic number, so that decompression continues
                    bytes.resize(1 + random.below(6000));
                    std::size_t magic = options.method == zcache::Method::zstd ? 4 : 0;
                    for (std::size_t at = magic; at < bytes.size(); ++at) {
                        bytes[at] = static_cast<std::byte>(random.next());
                    }
            }
            if (random.below(8) == 0) with_dictionary = !with_dictionary;
            wrong += !give(page_size);
            give(shorter);
        }
        EXPECT(wrong > 3000 && short_output > 3900);
    }
}

// The last page that a file can have is moved and evicted like any other; a larger index is refused.
void test_last_index(Random& random) {
    for (std::uint32_t page_size : {4096U, 65536U, 1U << 20}) {
        for (zcache::AllocatorKind allocator : {zcache::AllocatorKind::log, zcache::AllocatorKind::zbud}) {
            zcache::Options options;
            options.pool_limit = std::max(2U << 20, 8 * page_size);
            options.allocator = allocator;
            options.keep_poor = false;
            zcache::Zcache engine(options);
            int pool = engine.init_fs(page_size);
            EXPECT(pool >= 0);
            std::vector<std::byte> page(page_size);
            PageIndex end = (PageIndex{1} << 63) / page_size;
            for (PageIndex index : {end - 1, end, end * 2 - 1, PageIndex{1} << 52}) {
                for (std::size_t n = 0; n < 4 * options.pool_limit / page_size; ++n) {
                    fill_page({Content::mixed, 20, random.next()}, page);
                    zcache::Put put{index - n % 4, page.data(), zcache::no_token};
                    try {
                        engine.put(pool, {1, n / 4, "g"}, {&put, 1});
                        EXPECT(put.index < end);
                    } catch (const std::out_of_range&) {
                        EXPECT(put.index >= end);
                    }
                }
                engine.sync();
                engine.check();
            }
            EXPECT(engine.counters()["evicted_eph_zpages"] > 0);
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    Arguments arguments(argc, argv);
    std::printf("units: --seed %llu\n", static_cast<unsigned long long>(arguments.seed));
    Random random(arguments.seed);
    auto say = [](const char* part) {
        std::printf("  %s\n", part);
        std::fflush(stdout);
    };
    say("page table");
    test_page_table(random);
    say("slab");
    test_slab(random);
    say("staging");
    test_staging(random);
    say("ghosts");
    test_ghosts(random);
    say("loans");
    test_loans(random);
    say("allocators");
    for (Kind kind : {Kind::zbud, Kind::log, Kind::log_with_checksums}) {
        test_allocator(random, kind, 4096, 2 << 20);
        test_allocator(random, kind, 4096, 1 << 20);
        test_allocator(random, kind, 65536, 4 << 20);
        test_allocator(random, kind, 1 << 20, 8 << 20);
    }
    say("corruption");
    test_corruption(random);
    say("last index");
    test_last_index(random);
    std::printf("units: all passed\n");
}
