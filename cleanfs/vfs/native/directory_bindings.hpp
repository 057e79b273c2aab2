// Python classes of the state of open directories.
#pragma once

#include <nanobind/nanobind.h>

namespace cleanfs {

// Add cleanfs.vfs.directory_state's native classes.
void bind_directory_state(nanobind::module_& module);

}  // namespace cleanfs
