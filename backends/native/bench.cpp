// Measure the engine beside the bare compressor, without Python. For scripts/run bench/zcache.
//
// bench pages CORPUS METHOD LEVEL DICT ALLOCATOR LIMIT CHECKSUM: 4 KiB pages from a file
// bench curve ALLOCATOR PAGES...: the cost of operations while that many pages are stored
// Each prints one JSON object.
// Times are nanoseconds a page; the worker's are CPU time, which other load on its core does not change.
#include <lz4.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "zcache.hpp"

namespace {

using namespace zcache;

constexpr std::size_t page_size = 4096;
constexpr std::size_t range = 32;  // pages of a FUSE read
constexpr int rounds = 1;

double now() {
    return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double cpu(clockid_t clock) {
    timespec time{};
    clock_gettime(clock, &time);
    return static_cast<double>(time.tv_sec) * 1e9 + static_cast<double>(time.tv_nsec);
}

// CPU time of all threads except this one.
double others() { return cpu(CLOCK_PROCESS_CPUTIME_ID) - cpu(CLOCK_THREAD_CPUTIME_ID); }

std::vector<std::byte> read_file(const char* path) {
    std::ifstream in(path, std::ios::binary | std::ios::ate);
    std::vector<std::byte> data(static_cast<std::size_t>(in.tellg()) / page_size * page_size);
    in.seekg(0);
    in.read(reinterpret_cast<char*>(data.data()), static_cast<std::streamsize>(data.size()));
    return data;
}

struct BufferSink final : Sink {
    explicit BufferSink(std::byte* to) : buffer(to) {}
    std::byte* page(std::size_t at) override { return buffer + at * page_size; }
    void cancel(std::size_t) override { std::abort(); }
    std::byte* buffer;
};

struct Bare {
    double compress = 0, decompress = 0, bytes = 0;
};

// LZ4 itself over the same pages, with the same memory layout; pages that stay larger than 7/8 are copied.
Bare measure_bare(const std::vector<std::byte>& data, int acceleration) {
    std::size_t pages = data.size() / page_size;
    std::vector<char> state(static_cast<std::size_t>(LZ4_sizeofState()));
    std::vector<char> out(data.size() + page_size);
    std::vector<int> sizes(pages);
    constexpr int most = page_size * 7 / 8;
    char* to = out.data();
    double start = now();
    for (std::size_t at = 0; at < pages; ++at) {
        const char* page = reinterpret_cast<const char*>(data.data() + at * page_size);
        int size = LZ4_compress_fast_extState(state.data(), page, to, page_size, most, acceleration);
        if (size == 0) std::memcpy(to, page, page_size);
        sizes[at] = size;
        to += size == 0 ? page_size : static_cast<std::size_t>(size);
    }
    double middle = now();
    std::vector<char> buffer(range * page_size);
    const char* from = out.data();
    for (std::size_t at = 0; at < pages; ++at) {
        char* page = buffer.data() + at % range * page_size;
        if (sizes[at] == 0) std::memcpy(page, from, page_size);
        else if (LZ4_decompress_safe(from, page, sizes[at], page_size) != page_size) std::abort();
        from += sizes[at] == 0 ? page_size : static_cast<std::size_t>(sizes[at]);
    }
    auto n = static_cast<double>(pages);
    return {(middle - start) / n, (now() - middle) / n, static_cast<double>(from - out.data())};
}

struct Measured {
    double put = 0, worker = 0, get = 0, used = 0, metadata = 0, held = 0;
};

Measured measure(const std::vector<std::byte>& data, const Options& options) {
    std::size_t pages = data.size() / page_size;
    Zcache engine(options);
    int pool = engine.init_fs(page_size);
    FileKey key{1, 2, "generation"};
    // Batches too small to wake the worker, so that the caller's side is measured alone.
    std::size_t batch = std::clamp(options.pool_limit / 32, std::size_t{64} << 10, std::size_t{1} << 20) / 8 / page_size;
    Measured measured;
    std::vector<Put> puts;
    for (std::size_t at = 0; at < pages; at += batch) {
        std::size_t end = std::min(at + batch, pages);
        double start = now();
        for (std::size_t first = at; first < end; first += range) {
            puts.clear();
            for (std::size_t i = first; i < std::min(first + range, end); ++i) {
                puts.push_back({i, data.data() + i * page_size});
            }
            engine.put(pool, key, puts);
        }
        measured.put += now() - start;
        double before = others();
        engine.sync();
        measured.worker += others() - before;
    }
    Counts counts = engine.counters();
    std::vector<std::byte> buffer(range * page_size);
    BufferSink sink(buffer.data());
    std::size_t found = 0;
    double start = now();
    for (std::size_t at = 0; at < pages; at += range) found += engine.get(pool, key, at, range, sink);
    measured.get = (now() - start) / static_cast<double>(found);
    auto n = static_cast<double>(pages);
    measured.put /= n;
    measured.worker /= n;
    measured.used = static_cast<double>(counts["pool_used"]);
    measured.metadata = static_cast<double>(counts["metadata_bytes"]) / n;
    measured.held = static_cast<double>(found);
    return measured;
}

template <class Get>
double median(std::vector<Measured>& all, Get get) {
    std::vector<double> values;
    for (Measured& one : all) values.push_back(get(one));
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

AllocatorKind allocator_of(const char* name) {
    return std::string(name) == "zbud" ? AllocatorKind::zbud : AllocatorKind::log;
}

int measure_pages(char** argv) {
    std::vector<std::byte> data = read_file(argv[0]);
    std::string method = argv[1];
    Options options;
    options.codec.method = method == "zstd" ? Method::zstd : method == "lz4hc" ? Method::lz4hc
                         : method == "none" ? Method::none : Method::lz4;
    options.codec.level = std::atoi(argv[2]);
    options.codec.dictionary = std::atoi(argv[3]) != 0;
    options.allocator = allocator_of(argv[4]);
    options.keep_poor = options.allocator == AllocatorKind::log;
    options.pool_limit = std::strtoull(argv[5], nullptr, 10);
    options.checksum = std::atoi(argv[6]) != 0;

    std::vector<Measured> all;
    std::vector<double> compress, decompress;
    for (int round = 0; round < rounds; ++round) {
        Bare bare = measure_bare(data, 1);
        compress.push_back(bare.compress);
        decompress.push_back(bare.decompress);
        all.push_back(measure(data, options));
    }
    std::sort(compress.begin(), compress.end());
    std::sort(decompress.begin(), decompress.end());
    std::printf("{\"pages\": %zu, \"bare_lz4_compress\": %.1f, \"bare_lz4_decompress\": %.1f, \"put\": %.1f, "
                "\"worker\": %.1f, \"get\": %.1f, \"used\": %.0f, \"metadata\": %.2f, \"held\": %.0f}\n",
                data.size() / page_size, compress[rounds / 2], decompress[rounds / 2],
                median(all, [](auto& m) { return m.put; }), median(all, [](auto& m) { return m.worker; }),
                median(all, [](auto& m) { return m.get; }), median(all, [](auto& m) { return m.used; }),
                median(all, [](auto& m) { return m.metadata; }), median(all, [](auto& m) { return m.held; }));
    return 0;
}

// A unique page that compresses to some 100 bytes.
void make_page(std::vector<std::byte>& page, std::uint64_t number) {
    for (std::size_t at = 0; at < page.size(); at += sizeof number) {
        std::uint64_t word = at < 64 ? (number + at) * 0x9E3779B97F4A7C15ULL : at % 512;
        std::memcpy(page.data() + at, &word, sizeof word);
    }
}

// Files of 1,000 pages; operations on random stored pages.
int measure_curve(AllocatorKind allocator, const std::vector<std::size_t>& sizes) {
    constexpr std::size_t file_pages = 1000;
    constexpr std::size_t operations = 20000;
    Options options;
    options.pool_limit = std::size_t{1} << 40;
    options.allocator = allocator;
    options.keep_poor = allocator == AllocatorKind::log;
    Zcache engine(options);
    int pool = engine.init_fs(page_size);
    int shared = engine.init_shared_fs(Uuid{}, page_size);
    std::vector<std::byte> page(page_size);
    auto key = [](std::size_t number) { return FileKey{1, number / file_pages, "generation"}; };
    auto put = [&](int where, std::size_t number) {
        make_page(page, number);
        Put one{number % file_pages, page.data()};
        engine.put(where, key(number), {&one, 1});
    };
    std::uint64_t random = 1;
    auto draw = [&](std::size_t n) {
        random = random * 6364136223846793005ULL + 1442695040888963407ULL;
        return static_cast<std::size_t>((random >> 16) % n);
    };
    BufferSink sink(page.data());
    std::size_t held = 0;
    std::printf("[");
    for (std::size_t size : sizes) {
        for (; held < size; ++held) put(shared, held);
        engine.sync();
        auto each = [&](auto&& operation) {
            double start = now();
            for (std::size_t i = 0; i < operations; ++i) operation();
            return (now() - start) / operations;
        };
        Counts counts = engine.counters();
        double get = each([&] {
            std::size_t number = draw(held);
            engine.get(shared, key(number), number % file_pages, 1, sink);
        });
        double flush = each([&] {
            std::size_t number = draw(held);
            engine.flush_pages(shared, key(number), number % file_pages, number % file_pages + 1);
        });
        for (std::size_t i = 0; i < 50000; ++i) put(pool, i);
        engine.sync();
        double start = now();
        for (std::size_t i = 0; i < 50; ++i) engine.flush_inode(pool, key(i * file_pages));
        double flush_inode = (now() - start) / 50000;
        std::printf("%s{\"pages\": %zu, \"get\": %.1f, \"flush_page\": %.1f, \"flush_inode_per_page\": %.1f, "
                    "\"metadata\": %.2f}",
                    size == sizes.front() ? "" : ", ", size, get, flush, flush_inode,
                    static_cast<double>(counts["metadata_bytes"]) / static_cast<double>(counts["eph_zpages"]));
        std::fflush(stdout);
    }
    std::printf("]\n");
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    std::string what = argc > 1 ? argv[1] : "";
    if (what == "pages" && argc == 9) return measure_pages(argv + 2);
    if (what == "curve" && argc > 3) {
        std::vector<std::size_t> sizes;
        for (int at = 3; at < argc; ++at) sizes.push_back(std::strtoull(argv[at], nullptr, 10));
        return measure_curve(allocator_of(argv[2]), sizes);
    }
    std::fprintf(stderr, "usage: bench pages CORPUS METHOD LEVEL DICT ALLOCATOR LIMIT CHECKSUM\n"
                         "       bench curve ALLOCATOR PAGES...\n");
    return 2;
}
