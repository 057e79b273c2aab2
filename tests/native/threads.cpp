// Run several callers on one engine at once. A file used by one caller has exactly the pages that the caller
// left. For shared files, a clock that ticks with every call bounds the values that a get may still find.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "machine.hpp"

namespace {

using Clock = std::uint64_t;
constexpr Clock pending = ~Clock{0};

constexpr std::size_t callers = 4;
constexpr std::size_t shared_files = 2, shared_pages = 48;
constexpr std::size_t most_values = 1 << 17, most_tokens = 1 << 18;

// A value put on a shared file. In a private pool, it is found at most once for each time it was put.
struct Value {
    std::atomic<Clock> put_end{0};
    std::atomic<std::uint32_t> puts{0}, gets{0};
};

struct Round {
    Round(const zcache::Options& options, std::uint64_t of_seed)
        : engine(options), seed(of_seed), least(least_limit(options)), values(callers * most_values),
          tokens(most_tokens) {
        pools[0] = engine.init_fs(4096);
        pools[1] = engine.init_shared_fs(zcache::Uuid{1}, 4096);
        pools[2] = engine.init_fs(16384);
        for (int pool : pools) EXPECT(pool >= 0);
    }

    zcache::Zcache engine;
    const std::uint64_t seed;
    const std::size_t least;
    int pools[3];
    std::atomic<Clock> clock{1};
    std::vector<Value> values;
    // When the last finished change of a page began: values whose put ended before it are discarded.
    std::atomic<Clock> floors[2][shared_files][shared_pages]{};
    std::vector<std::atomic<std::uint8_t>> tokens;  // 0: unused, 1: on loan, 2: returned
    std::atomic<std::uint64_t> next_token{1}, returned_tokens{0};
    std::atomic<bool> over{false};
};

class Caller {
public:
    Caller(Round& round, std::size_t number)
        : round_(round), engine_(round.engine), number_(number), random_(round.seed * 64 + number) {}

    void run() {
        while (!round_.over) {
            std::uint64_t choice = random_.below(1000);
            if (choice < 250) put_own();
            else if (choice < 450) get_own();
            else if (choice < 480) flush_own();
            else if (choice < 650) put_shared();
            else if (choice < 880) get_shared();
            else if (choice < 900) flush_shared();
            else if (choice < 905) own_pool();
            else if (choice < 908) engine_.sync();
            else if (choice < 911) engine_.check();
            else if (choice < 914) engine_.resize(round_.least + random_.below(3 * round_.least));
            else if (choice < 940) engine_.counters();
            else if (choice < 942) engine_.end_loans();
            else collect();
        }
    }

    void collect() {
        std::vector<zcache::Token> returned;
        engine_.take_returned(returned);
        for (zcache::Token token : returned) {
            EXPECT(round_.tokens[token].exchange(2) == 1);
            ++round_.returned_tokens;
        }
    }

    std::uint64_t hits = 0;

private:
    struct Sink final : zcache::Sink {
        Sink(Caller& of, std::size_t count, std::size_t size)
            : caller(of), page_size(size), pages(count * size), filled(count), tokens(count) {}

        std::byte* page(std::size_t at) override {
            filled[at] = true;
            return pages.data() + at * page_size;
        }
        zcache::Token token(std::size_t at) override {
            if (caller.random_.below(4) == 0) return zcache::no_token;
            std::uint64_t token = caller.round_.next_token++;
            if (token >= most_tokens) return zcache::no_token;
            EXPECT(caller.round_.tokens[token].exchange(1) == 0);
            return tokens[at] = token;
        }
        void cancel(std::size_t) override { fail(__FILE__, __LINE__, "a page can be decoded"); }
        zcache::MutableBytes bytes(std::size_t at) { return {pages.data() + at * page_size, page_size}; }

        Caller& caller;
        const std::size_t page_size;
        std::vector<std::byte> pages;
        std::vector<bool> filled;
        std::vector<zcache::Token> tokens;
    };

    // Make a page that begins with the id of its value.
    static void make_page(std::uint64_t id, zcache::MutableBytes page) {
        auto look = static_cast<Content::Look>(id * 7 / 3 % Content::looks);
        fill_page({look, static_cast<std::uint8_t>(id % 33), look == Content::zero ? 0 : id}, page);
        if (look != Content::word) std::memcpy(page.data(), &id, sizeof id);
    }
    static std::uint64_t read_page(zcache::Bytes page) {
        std::uint64_t id;
        std::memcpy(&id, page.data(), sizeof id);
        std::vector<std::byte> expected(page.size());
        make_page(id, expected);
        EXPECT(std::memcmp(expected.data(), page.data(), page.size()) == 0);
        return id;
    }

    // -- the caller's own files ----------------------------------------------------------------------

    zcache::FileKey own_key() const { return {1, 100 + number_, "own"}; }
    std::uint32_t page_size(std::size_t pool) const { return pool == 2 ? 16384 : 4096; }
    zcache::PageIndex own_index() {
        return random_.below(8) == 0 ? random_.next() % (1ULL << 40) : random_.below(64);
    }

    void put_own() {
        std::size_t pool = random_.below(3), count = 1 + random_.below(8);
        zcache::PageIndex first = own_index();
        std::vector<std::byte> data(count * page_size(pool));
        std::vector<zcache::Put> puts;
        for (std::size_t at = 0; at < count; ++at) {
            std::uint64_t id = ++ids_ << 8 | number_ << 4;
            zcache::MutableBytes page{data.data() + at * page_size(pool), page_size(pool)};
            make_page(id, page);
            puts.push_back({first + at, page.data(), zcache::no_token});
            own_[pool][first + at] = id;
        }
        engine_.put(round_.pools[pool], own_key(), puts);
    }

    void get_own() {
        std::size_t pool = random_.below(3), count = 1 + random_.below(16);
        zcache::PageIndex first = own_index();
        Sink sink(*this, count, page_size(pool));
        engine_.get(round_.pools[pool], own_key(), first, count, sink);
        std::map<zcache::PageIndex, std::uint64_t>& own = own_[pool];
        for (std::size_t at = 0; at < count; ++at) {
            auto expected = own.find(first + at);
            if (!sink.filled[at]) {
                if (expected != own.end()) own.erase(expected);
                continue;
            }
            ++hits;
            EXPECT(expected != own.end());
            EXPECT(read_page(sink.bytes(at)) == expected->second);
            if (pool == 1) continue;
            if (random_.below(2) == 0) {
                zcache::Put back{first + at, sink.bytes(at).data(), sink.tokens[at]};
                engine_.put(round_.pools[pool], own_key(), {&back, 1});
            } else {
                own.erase(expected);
            }
        }
    }

    void flush_own() {
        std::size_t pool = random_.below(3);
        std::map<zcache::PageIndex, std::uint64_t>& own = own_[pool];
        if (random_.below(4) == 0) {
            engine_.flush_inode(round_.pools[pool], own_key());
            own.clear();
        } else {
            zcache::PageIndex first = own_index(), stop = first + random_.below(64);
            engine_.flush_pages(round_.pools[pool], own_key(), first, stop);
            own.erase(own.lower_bound(first), own.lower_bound(stop));
        }
    }

    void own_pool() {
        int pool = engine_.init_fs(random_.below(2) == 0 ? 4096 : 65536);
        std::vector<std::byte> page(65536);
        make_page(++ids_ << 8, page);
        zcache::Put put{0, page.data(), zcache::no_token};
        for (std::uint64_t inode = 0; inode < 20; ++inode) engine_.put(pool, {1, inode, ""}, {&put, 1});
        engine_.flush_fs(pool);
        try {
            engine_.flush_fs(pool);
            fail(__FILE__, __LINE__, "a flushed pool is unknown");
        } catch (const zcache::UnknownPool&) {
        }
    }

    // -- shared files -------------------------------------------------------------------------------

    static zcache::FileKey shared_key(std::size_t file) { return {2, file, "shared"}; }
    Value& value(std::uint64_t id) { return round_.values[(id >> 4 & 15) * most_values + (id >> 8)]; }

    static void raise(std::atomic<Clock>& floor, Clock to) {
        Clock was = floor;
        while (was < to && !floor.compare_exchange_weak(was, to)) {
        }
    }

    void put_value(std::size_t pool, std::size_t file, zcache::PageIndex index, std::uint64_t id,
                   const std::byte* data, zcache::Token token) {
        value(id).put_end = pending;
        ++value(id).puts;
        Clock start = round_.clock++;
        zcache::Put put{index, data, token};
        engine_.put(round_.pools[pool], shared_key(file), {&put, 1});
        value(id).put_end = round_.clock++;
        raise(round_.floors[pool][file][index], start);
    }

    void put_shared() {
        if (shared_ids_ + 1 == most_values) return;
        std::size_t pool = random_.below(2);
        std::uint64_t id = ++shared_ids_ << 8 | number_ << 4 | 1 << 2 | pool;
        std::vector<std::byte> page(4096);
        make_page(id, page);
        put_value(pool, random_.below(shared_files), random_.below(shared_pages), id, page.data(),
                  zcache::no_token);
    }

    void get_shared() {
        std::size_t pool = random_.below(2), file = random_.below(shared_files);
        std::size_t first = random_.below(shared_pages);
        std::size_t count = 1 + random_.below(std::min<std::size_t>(8, shared_pages - first));
        std::vector<Clock> floors;
        for (std::size_t at = 0; at < count; ++at) floors.push_back(round_.floors[pool][file][first + at]);
        Sink sink(*this, count, 4096);
        engine_.get(round_.pools[pool], shared_key(file), first, count, sink);
        for (std::size_t at = 0; at < count; ++at) {
            if (!sink.filled[at]) continue;
            ++hits;
            std::uint64_t id = read_page(sink.bytes(at));
            EXPECT((id & 15) == (1 << 2 | pool));
            Value& found = value(id);
            EXPECT(found.put_end >= floors[at]);
            if (pool != 0) continue;
            EXPECT(++found.gets <= found.puts);
            if (random_.below(2) == 0) continue;
            put_value(pool, file, first + at, id, sink.bytes(at).data(), sink.tokens[at]);
        }
    }

    void flush_shared() {
        std::size_t pool = random_.below(2), file = random_.below(shared_files);
        std::size_t first = random_.below(shared_pages), stop = first + random_.below(shared_pages - first + 1);
        Clock start = round_.clock++;
        if (random_.below(8) == 0) {
            first = 0;
            stop = shared_pages;
            engine_.flush_inode(round_.pools[pool], shared_key(file));
        } else {
            engine_.flush_pages(round_.pools[pool], shared_key(file), first, stop);
        }
        for (std::size_t at = first; at < stop; ++at) raise(round_.floors[pool][file][at], start);
    }

    Round& round_;
    zcache::Zcache& engine_;
    const std::size_t number_;
    Random random_;
    std::uint64_t ids_ = 0, shared_ids_ = 0;
    std::map<zcache::PageIndex, std::uint64_t> own_[3];
};

}  // namespace

int main(int argc, char** argv) {
    Arguments arguments(argc, argv);
    using Seconds = std::chrono::duration<double>;
    auto start = std::chrono::steady_clock::now();
    std::uint64_t seed = arguments.seed, hits = 0, tokens = 0;
    do {
        RandomChoices choices(seed);
        zcache::Options options = choose_options(choices, choices.one_in(2));
        std::printf("threads: --seconds 0 --seed %llu: %s\n", static_cast<unsigned long long>(seed++),
                    describe(options).c_str());
        std::fflush(stdout);
        Round round(options, seed);
        std::vector<std::unique_ptr<Caller>> all;
        std::vector<std::thread> threads;
        for (std::size_t i = 0; i < callers; ++i) {
            all.push_back(std::make_unique<Caller>(round, i));
            threads.emplace_back([caller = all.back().get()] { caller->run(); });
        }
        std::this_thread::sleep_for(Seconds(3));
        round.over = true;
        for (std::thread& thread : threads) thread.join();
        round.engine.end_loans();
        all[0]->collect();
        round.engine.sync();
        round.engine.check();
        std::uint64_t issued = 0;
        for (const auto& token : round.tokens) {
            EXPECT(token != 1);
            issued += token == 2;
        }
        EXPECT(issued == round.returned_tokens);
        tokens += issued;
        for (const auto& caller : all) hits += caller->hits;
    } while (std::chrono::steady_clock::now() - start < Seconds(arguments.seconds));
    std::printf("threads: %llu engines, %llu hits, %llu loans\n",
                static_cast<unsigned long long>(seed - arguments.seed),
                static_cast<unsigned long long>(hits), static_cast<unsigned long long>(tokens));
}
