#include "eviction_program.hpp"

#include <bpf/libbpf.h>
#include <sys/sysmacros.h>

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "evictions.skel.h"

namespace cleanfs {

namespace {

// What libbpf says last on this thread before it fails.
thread_local std::string last_warning;

int keep_warning(libbpf_print_level level, const char* format, va_list arguments) {
    if (level != LIBBPF_WARN) return 0;
    char line[256];
    std::vsnprintf(line, sizeof line, format, arguments);
    last_warning = line;
    while (!last_warning.empty() && last_warning.back() == '\n') last_warning.pop_back();
    return 0;
}

[[noreturn]] void fail(const char* what, int error) {
    std::string reason = std::string(what) + ": " + std::strerror(error);
    if (error != EPERM && !last_warning.empty()) reason += " (" + last_warning + ")";
    throw std::runtime_error(reason);
}

// MKDEV of the kernel.
std::uint64_t kernel_number(dev_t device) { return std::uint64_t{major(device)} << 20 | minor(device); }

}  // namespace

void EvictionProgram::Destroy::operator()(eviction_program* program) const { eviction_program::destroy(program); }

EvictionProgram::EvictionProgram(std::size_t ring_size) {
    libbpf_set_print(keep_warning);
    last_warning.clear();
    program_.reset(eviction_program::open());
    if (!program_) fail("cannot open the program", errno);
    if (const int error = bpf_map__set_max_entries(program_->maps.ring, static_cast<__u32>(ring_size))) fail("cannot size the ring", -error);
    if (const int error = eviction_program::load(program_.get())) fail("the kernel refuses the program", -error);
    settings().paused = 1;
    ring_.emplace(bpf_map__fd(program_->maps.ring), ring_size);
    if (const int error = eviction_program::attach(program_.get())) fail("the kernel refuses to attach the program", -error);
}

EvictionProgram::~EvictionProgram() = default;

volatile eviction_settings& EvictionProgram::settings() { return program_->bss->settings; }

eviction_counts EvictionProgram::counts() const {
    const volatile eviction_counts& now = program_->bss->counts;
    return {now.seen, now.removed, now.unclean, now.lost, now.unreadable};
}

void EvictionProgram::watch(dev_t device, std::size_t wake_bytes) {
    settings().device = kernel_number(device);
    settings().wake_bytes = wake_bytes;
    settings().paused = 0;
}

}  // namespace cleanfs
