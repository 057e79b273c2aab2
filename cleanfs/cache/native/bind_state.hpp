#pragma once

#include <nanobind/nanobind.h>

namespace cleanfs {

void bind_state(nanobind::module_& module);

}  // namespace cleanfs
