// Generate pages from a few numbers that suffice to verify them later.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "types.hpp"

// Report a failed expectation and abort. Unlike assert(), it is active in every build.
[[noreturn]] inline void fail(const char* file, int line, const char* condition) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s:%d: expectation failed: %s\n", file, line, condition);
    std::abort();
}
#define EXPECT(condition) ((condition) ? void() : fail(__FILE__, __LINE__, #condition))

// splitmix64: small, and good enough for numbers that only have to differ.
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed) {}

    std::uint64_t next() {
        std::uint64_t z = state_ += 0x9E3779B97F4A7C15ULL;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ULL;
        z = (z ^ z >> 27) * 0x94D049BB133111EBULL;
        return z ^ z >> 31;
    }
    std::uint64_t below(std::uint64_t end) { return next() % end; }

private:
    std::uint64_t state_;
};

struct Content {
    enum Look : std::uint8_t { zero, word, text, noise, mixed, looks };

    Look look = zero;
    std::uint8_t noisy_part = 0;  // mixed: this many 32nds of the page do not compress
    std::uint64_t seed = 0;

    bool operator==(const Content&) const = default;
};

inline void fill_page(const Content& content, zcache::MutableBytes page) {
    Random random(content.seed);
    std::size_t at = 0;
    auto word = [&](std::uint64_t value) {
        std::memcpy(page.data() + at, &value, 8);
        at += 8;
    };
    auto noise_to = [&](std::size_t end) {
        while (at < end) word(random.next());
    };
    auto text_to = [&](std::size_t end) {
        char line[64];
        while (at < end) {  // like a log: some words are common to all lines, some are unique
            std::uint64_t n = random.next();
            std::snprintf(line, sizeof line, "2024-05-%02u host%u cleanfs[%08x]: page %10u read, ok\n",
                          static_cast<unsigned>(n % 31 + 1), static_cast<unsigned>(n >> 8 & 7),
                          static_cast<unsigned>(content.seed), static_cast<unsigned>(n >> 40));
            std::size_t length = std::min(std::strlen(line), end - at);
            std::memcpy(page.data() + at, line, length);
            at += length;
        }
    };
    switch (content.look) {
        case Content::zero:
            std::memset(page.data(), 0, page.size());
            break;
        case Content::word:
            while (at < page.size()) word(content.seed);
            break;
        case Content::text:
            text_to(page.size());
            break;
        case Content::noise:
            noise_to(page.size());
            break;
        default:
            noise_to(page.size() / 32 * content.noisy_part);
            text_to(page.size());
    }
}

inline bool is_page(const Content& content, zcache::Bytes page) {
    std::vector<std::byte> expected(page.size());
    fill_page(content, expected);
    return std::memcmp(expected.data(), page.data(), page.size()) == 0;
}

// The arguments of every program: --seconds N --seed N.
struct Arguments {
    double seconds = 5;
    std::uint64_t seed = 1;

    Arguments(int argc, char** argv) {
        for (int i = 1; i < argc; i += 2) {
            std::string name = argv[i];
            if (i + 1 < argc && name == "--seconds") seconds = std::strtod(argv[i + 1], nullptr);
            else if (i + 1 < argc && name == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 0);
            else {
                std::fprintf(stderr, "usage: %s [--seconds N] [--seed N]\n", argv[0]);
                std::exit(2);
            }
        }
    }
};
