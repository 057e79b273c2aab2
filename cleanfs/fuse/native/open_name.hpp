// Open names of the source, by openat2(2).
#pragma once

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

namespace cleanfs {

// Of Linux 5.12, newer than some headers.
constexpr std::uint64_t resolve_cached = 0x20;

// Open a name in a directory, by its path alone, on this file system. -1 and errno if that fails.
inline int open_name(int directory, const char* name, std::uint64_t resolve) {
    open_how how{};
    how.flags = O_PATH | O_NOFOLLOW | O_CLOEXEC;
    how.resolve = RESOLVE_NO_XDEV | resolve;
    return static_cast<int>(syscall(SYS_openat2, directory, name, &how, sizeof how));
}

// namespace.lookup_here. It may wait for the file system.
inline int open_here(int directory, const char* name) { return open_name(directory, name, 0); }

// namespace.lookup_cached. EAGAIN where that would wait.
inline int open_cached(int directory, const char* name) {
    // It also fails while anything is being mounted, or renamed, on the machine.
    for (int attempt = 0; attempt < 3; ++attempt) {
        const int fd = open_name(directory, name, resolve_cached);
        if (fd >= 0 || errno != EAGAIN) return fd;
    }
    return -1;
}

}  // namespace cleanfs
