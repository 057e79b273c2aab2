// Learn which session pyfuse3 mounts.
//
// This library exports `fuse_session_mount` and is loaded with RTLD_GLOBAL before pyfuse3, so that the dynamic linker
// binds pyfuse3's call to it. It notes the session and calls libfuse's own function.
#include "session.hpp"

#include <dlfcn.h>

namespace {

fuse_session* mounted = nullptr;

using Mount = decltype(&fuse_session_mount);

// libfuse's own function, from the library that we were linked with, whatever its version. Null if it is not found.
Mount find_real() {
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(&fuse_session_fd), &info) == 0) return nullptr;
    void* libfuse = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (libfuse == nullptr) return nullptr;  // dlsym(3) would take it for RTLD_DEFAULT, and find us
    const auto found = reinterpret_cast<Mount>(dlsym(libfuse, "fuse_session_mount"));
    return found == &fuse_session_mount ? nullptr : found;
}

}  // namespace

namespace cleanfs {

fuse_session* mounted_session() { return mounted; }

}  // namespace cleanfs

extern "C" __attribute__((visibility("default"))) int fuse_session_mount(fuse_session* session, const char* mountpoint) {
    static const Mount real = find_real();
    mounted = nullptr;
    if (real == nullptr) return -1;
    const int result = real(session, mountpoint);
    if (result == 0) mounted = session;
    return result;
}
