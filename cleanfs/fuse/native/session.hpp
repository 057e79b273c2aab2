// The libfuse session that pyfuse3 makes and keeps to itself.
#pragma once

#define FUSE_USE_VERSION 314
#include <fuse3/fuse_lowlevel.h>

namespace cleanfs {

// The last session that was mounted in this process; null if there is none, or if pyfuse3 was loaded before this
// library.
fuse_session* mounted_session();

}  // namespace cleanfs
