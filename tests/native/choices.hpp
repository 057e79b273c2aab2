// Make the decisions of a test from a random generator or a fuzzer, and choose an engine's options by them.
#pragma once

#include <stdexcept>
#include <string>

#include "pages.hpp"
#include "zcache.hpp"

// The source of all decisions of a test.
class Choices {
public:
    virtual ~Choices() = default;
    virtual std::uint64_t below(std::uint64_t end) = 0;
    bool one_in(std::uint64_t n) { return below(n) == 0; }
};

class RandomChoices final : public Choices {
public:
    explicit RandomChoices(std::uint64_t seed) : random_(seed) {}
    std::uint64_t below(std::uint64_t end) override { return random_.below(end); }

private:
    Random random_;
};

// Return the least limit that the engine accepts for these options.
inline std::size_t least_limit(zcache::Options options) {
    for (options.pool_limit = std::size_t{1} << 20;; options.pool_limit *= 2) {
        try {
            zcache::Zcache engine(options);
            return options.pool_limit;
        } catch (const std::invalid_argument&) {
            EXPECT(options.pool_limit < std::size_t{1} << 30);
        }
    }
}

inline zcache::Options choose_options(Choices& choices, bool small) {
    using zcache::Method;
    zcache::Options options;
    switch (choices.below(5)) {
        case 0:
            options.codec = {Method::none, 1, false};
            break;
        case 1:
            options.codec = {Method::lz4, 1 + static_cast<int>(choices.below(9)), false};
            break;
        case 2:
            options.codec = {Method::lz4hc, 1 + static_cast<int>(choices.below(9)), false};
            break;
        case 3:
            options.codec = {Method::zstd, static_cast<int>(choices.below(6)) - 2, false};
            break;
        default:
            options.codec = {Method::zstd, 1, !small};
    }
    options.was_active = choices.one_in(3);
    options.checksum = !choices.one_in(3);
    options.keep_poor = !choices.one_in(3);
    if (options.codec.method != Method::none && choices.one_in(2)) {
        options.allocator = zcache::AllocatorKind::zbud;
        options.keep_poor = false;
    }
    options.pool_limit = least_limit(options) + choices.below(small ? 256 : 4096) * (small ? 4096 : 2048);
    return options;
}

inline std::string describe(const zcache::Options& options) {
    const char* methods[] = {"none", "lz4", "lz4hc", "zstd"};
    return std::string(methods[static_cast<int>(options.codec.method)]) +
           (options.codec.dictionary ? " with a dictionary" : "") + ", level " +
           std::to_string(options.codec.level) +
           (options.allocator == zcache::AllocatorKind::log ? ", log" : ", zbud") +
           (options.keep_poor ? ", keeps poor" : "") + (options.was_active ? ", was active" : "") +
           (options.checksum ? ", checksums" : "") + ", limit " + std::to_string(options.pool_limit);
}
