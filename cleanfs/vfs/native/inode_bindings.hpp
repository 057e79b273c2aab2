// Python classes of the state of inodes.
#pragma once

#include <nanobind/nanobind.h>

namespace cleanfs {

// Add cleanfs.vfs.inode_state's native classes. KernelState must be there.
void bind_inode_states(nanobind::module_& module);

}  // namespace cleanfs
