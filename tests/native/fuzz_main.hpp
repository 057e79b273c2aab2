// What runs a fuzz target where libFuzzer does not: random input, for as long as the arguments say.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "pages.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

// Each byte of an input of at most `size` bytes is `byte_of(random)`. The seed of each `every`th input is printed.
template <class ByteOf>
void fuzz(const char* name, int argc, char** argv, std::size_t size, std::uint64_t every, ByteOf&& byte_of) {
    Arguments arguments(argc, argv);
    const auto start = std::chrono::steady_clock::now();
    std::uint64_t seed = arguments.seed;
    do {
        Random random(seed);
        std::vector<std::uint8_t> input(1 + random.below(size));
        for (std::uint8_t& byte : input) byte = static_cast<std::uint8_t>(byte_of(random));
        if (seed % every == 0) std::printf("%s: --seconds 0 --seed %llu\n", name, static_cast<unsigned long long>(seed));
        ++seed;
        std::fflush(stdout);
        LLVMFuzzerTestOneInput(input.data(), input.size());
    } while (std::chrono::steady_clock::now() - start < std::chrono::duration<double>(arguments.seconds));
}
