// Run random operations while memory is scarce: mmap, malloc and new fail now and then within the engine,
// also in its worker. Pages may then be missing, but none may be wrong.
#include <errno.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>

#include "machine.hpp"

namespace {

// One request in this many fails; none while it is 0.
std::atomic<std::uint64_t> scarce{0};
std::atomic<std::uint64_t> failed{0};

bool is_scarce() noexcept {
    std::uint64_t one_in = scarce.load(std::memory_order_relaxed);
    if (one_in == 0) return false;
    thread_local Random random(failed.load());
    if (random.below(one_in) != 0) return false;
    failed.fetch_add(1, std::memory_order_relaxed);
    return true;
}

struct Scarce final : Scarcity {
    explicit Scarce(std::uint64_t one_in) : one_in_(one_in) {}
    void begin() override { scarce = one_in_; }
    void end() override { scarce = 0; }

private:
    const std::uint64_t one_in_;
};

}  // namespace

extern "C" {

void* __real_mmap(void*, std::size_t, int, int, int, off_t);
void* __real_malloc(std::size_t);

void* __wrap_mmap(void* at, std::size_t size, int protection, int flags, int fd, off_t offset) {
    if (!is_scarce()) return __real_mmap(at, size, protection, flags, fd, offset);
    errno = ENOMEM;
    return MAP_FAILED;
}

void* __wrap_malloc(std::size_t size) { return is_scarce() ? nullptr : __real_malloc(size); }

}  // extern "C"

void* operator new(std::size_t size) {
    void* memory = is_scarce() ? nullptr : __real_malloc(size);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

int main(int argc, char** argv) {
    Arguments arguments(argc, argv);
    auto start = std::chrono::steady_clock::now();
    std::uint64_t seed = arguments.seed;
    do {
        RandomChoices choices(seed);
        zcache::Options options = choose_options(choices, true);
        std::printf("faults: --seconds 0 --seed %llu: %s\n", static_cast<unsigned long long>(seed++),
                    describe(options).c_str());
        std::fflush(stdout);
        Scarce scarcity(choices.one_in(2) ? 20 : 200);
        Machine machine(options, choices, scarcity);
        for (std::uint64_t left = 1000 + choices.below(3000); left > 0; --left) machine.step();
        machine.finish();
    } while (std::chrono::steady_clock::now() - start < std::chrono::duration<double>(arguments.seconds));
    std::printf("faults: %llu engines, %llu requests for memory failed\n",
                static_cast<unsigned long long>(seed - arguments.seed),
                static_cast<unsigned long long>(failed.load()));
}
