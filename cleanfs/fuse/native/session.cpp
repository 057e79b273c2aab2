// Learn which session pyfuse3 mounts.
//
// This library exports `fuse_session_mount` and is loaded with RTLD_GLOBAL before pyfuse3, so that the dynamic linker
// binds pyfuse3's call to it. It notes the session and calls libfuse's own function.
#include "session.hpp"

#include <dlfcn.h>

namespace {

fuse_session* mounted = nullptr;

// The name under which the linker finds the library that we were linked with, whatever its version.
void* libfuse() {
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(&fuse_session_fd), &info) == 0) return nullptr;
    return dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
}

}  // namespace

namespace cleanfs {

fuse_session* mounted_session() { return mounted; }

}  // namespace cleanfs

extern "C" __attribute__((visibility("default"))) int fuse_session_mount(fuse_session* session, const char* mountpoint) {
    static const auto real = reinterpret_cast<decltype(&fuse_session_mount)>(dlsym(libfuse(), "fuse_session_mount"));
    mounted = nullptr;
    if (real == nullptr) return -1;
    const int result = real(session, mountpoint);
    if (result == 0) mounted = session;
    return result;
}
