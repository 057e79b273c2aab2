// Raise an errno in Python.
#pragma once

#include <nanobind/nanobind.h>

#include <cerrno>

namespace cleanfs {

// Raises OSError, or its subclass for this errno.
[[noreturn]] inline void raise_errno(int error) {
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
    throw nanobind::python_error();
}

}  // namespace cleanfs
