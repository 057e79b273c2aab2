// Run random operations of one caller, for hours if wanted: one engine after another, each with options and
// operations that follow from its seed. The worker's timing does not follow from it, so a failure may need a
// few runs to recur.
#include <chrono>

#include "machine.hpp"

int main(int argc, char** argv) {
    Arguments arguments(argc, argv);
    auto start = std::chrono::steady_clock::now();
    std::map<std::string, std::uint64_t> totals;
    std::uint64_t seed = arguments.seed, steps = 0;
    do {
        RandomChoices choices(seed);
        zcache::Options options = choose_options(choices, false);
        std::printf("stress: --seconds 0 --seed %llu: %s\n", static_cast<unsigned long long>(seed),
                    describe(options).c_str());
        std::fflush(stdout);
        Scarcity none;
        Machine machine(options, choices, none);
        for (std::uint64_t left = 1000 + choices.below(4000); left > 0; --left, ++steps) machine.step();
        machine.finish();
        for (const auto& [name, count] : machine.counts()) totals[name] += count;
        totals["hits"] += machine.hits();
        totals["misses"] += machine.misses();
        ++seed;
    } while (std::chrono::steady_clock::now() - start < std::chrono::duration<double>(arguments.seconds));

    for (const char* name : {"hits", "misses", "revived_zpages", "evicted_eph_zpages", "evicted_raw_pages",
                             "failed_eph_puts", "staging_full", "log_compacted_segments", "log_spared_entries",
                             "eph_nonactive_puts_ignored", "zbud_eph_evicted_pageframes", "dictionary_bytes"}) {
        std::printf("  %-28s %llu\n", name, static_cast<unsigned long long>(totals[name]));
    }
    std::printf("stress: %llu engines, %llu steps\n", static_cast<unsigned long long>(seed - arguments.seed),
                static_cast<unsigned long long>(steps));
}
