// Times and stamps as Python has them.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>

#include "state.hpp"

namespace cleanfs {

namespace nb = nanobind;

constexpr std::int64_t low_bits = (std::int64_t{1} << 62) - 1;

inline nb::object to_python(Nanoseconds time) {
    if (time == static_cast<std::int64_t>(time)) return nb::int_(static_cast<std::int64_t>(time));
    return (nb::int_(static_cast<std::int64_t>(time >> 62)) << nb::int_(62)) + nb::int_(static_cast<std::int64_t>(time & low_bits));
}

inline Nanoseconds to_nanoseconds(nb::handle time) {
    int overflow = 0;
    const long long fits = PyLong_AsLongLongAndOverflow(time.ptr(), &overflow);
    if (overflow == 0) {
        if (fits == -1 && PyErr_Occurred() != nullptr) throw nb::python_error();
        return fits;
    }
    const auto high = nb::cast<std::int64_t>(time >> nb::int_(62)), low = nb::cast<std::int64_t>(time & nb::int_(low_bits));
    return (Nanoseconds{high} << 62) + low;
}

inline nb::object to_python(const std::optional<Stamps>& stamps) {
    if (!stamps) return nb::none();
    return nb::make_tuple(stamps->size, to_python(stamps->mtime_ns), to_python(stamps->ctime_ns));
}

inline std::optional<Stamps> to_stamps(nb::object stamps) {
    if (stamps.is_none()) return std::nullopt;
    const auto tuple = nb::cast<nb::tuple>(stamps);
    if (tuple.size() != 3) throw nb::value_error("stamps are (size, mtime_ns, ctime_ns)");
    return Stamps{nb::cast<std::int64_t>(tuple[0]), to_nanoseconds(tuple[1]), to_nanoseconds(tuple[2])};
}

}  // namespace cleanfs
