// How entries of the native module are bound. A family's bindings register themselves and are called when the module is
// made. Entries are the kernels' own functions: an address comes as an integer (0: null), a struct as a tuple of its
// fields in their order (None: all of them zero), an enumeration as a word.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace lgk {

namespace py = pybind11;

// -- registration ---------------------------------------------------------------------------------------------------

enum class Processor { kCpu, kCuda };
using Binder = void (*)(py::module_&);

inline std::vector<Binder>& binders(Processor processor) {
  static std::vector<Binder> all[2];
  return all[static_cast<int>(processor)];
}

// A static object of this type in a family's bindings.cpp adds what `bind` defines to lgkernels._C.cpu or ._C.cuda.
struct Registration {
  Registration(Processor processor, Binder bind) { binders(processor).push_back(bind); }
};

// -- arguments ------------------------------------------------------------------------------------------------------

template <class T>
struct Pointer {
  T* address;
  operator T*() const { return address; }
};

// What is loaded for a parameter or field of type T.
template <class T>
struct Loaded {
  using type = T;
};
template <class T>
struct Loaded<T*> {
  using type = Pointer<T>;
};

using Release = py::call_guard<py::gil_scoped_release>;

// Defines `name` as a function whose status is its result. Other threads of Python run meanwhile: a launch waits where
// the queue of the stream is full.
template <class R, class... A>
void define(py::module_& m, const char* name, R (*function)(A...), const char* doc = "") {
  m.def(name, [function](typename Loaded<A>::type... arguments) { return function(arguments...); }, doc, Release());
}

// References to the N fields of an aggregate.
template <size_t N, class T>
auto fields(T& t) {
  static_assert(N >= 2 && N <= 12, "another line is wanted here, or the struct in parts");
  // clang-format off
  if constexpr (N == 2) { auto& [a, b] = t; return std::tie(a, b); }
  if constexpr (N == 3) { auto& [a, b, c] = t; return std::tie(a, b, c); }
  if constexpr (N == 4) { auto& [a, b, c, d] = t; return std::tie(a, b, c, d); }
  if constexpr (N == 5) { auto& [a, b, c, d, e] = t; return std::tie(a, b, c, d, e); }
  if constexpr (N == 6) { auto& [a, b, c, d, e, f] = t; return std::tie(a, b, c, d, e, f); }
  if constexpr (N == 7) { auto& [a, b, c, d, e, f, g] = t; return std::tie(a, b, c, d, e, f, g); }
  if constexpr (N == 8) { auto& [a, b, c, d, e, f, g, h] = t; return std::tie(a, b, c, d, e, f, g, h); }
  if constexpr (N == 9) { auto& [a, b, c, d, e, f, g, h, i] = t; return std::tie(a, b, c, d, e, f, g, h, i); }
  if constexpr (N == 10) { auto& [a, b, c, d, e, f, g, h, i, j] = t; return std::tie(a, b, c, d, e, f, g, h, i, j); }
  if constexpr (N == 11) { auto& [a, b, c, d, e, f, g, h, i, j, k] = t;
                           return std::tie(a, b, c, d, e, f, g, h, i, j, k); }
  if constexpr (N == 12) { auto& [a, b, c, d, e, f, g, h, i, j, k, l] = t;
                           return std::tie(a, b, c, d, e, f, g, h, i, j, k, l); }
  // clang-format on
}

// The words of an enumeration, in the order of its values from 0 on.
template <class E>
constexpr std::array<const char*, 0> kWords{};

template <class T>
bool load_field(py::handle source, T& field) {
  py::detail::make_caster<typename Loaded<T>::type> caster;
  if (!caster.load(source, true)) return false;
  field = py::detail::cast_op<typename Loaded<T>::type>(caster);
  return true;
}

template <class T, size_t N>
bool load_field(py::handle source, T (&field)[N]) {
  if (!PySequence_Check(source.ptr()) || PySequence_Size(source.ptr()) != static_cast<Py_ssize_t>(N)) return false;
  for (size_t i = 0; i < N; ++i)
    if (!load_field(py::object(py::reinterpret_borrow<py::sequence>(source)[i]), field[i])) return false;
  return true;
}

template <class T, size_t N>
struct TupleCaster {
  PYBIND11_TYPE_CASTER(T, py::detail::const_name("tuple of ") + py::detail::const_name<N>());

  bool load(py::handle source, bool) {
    value = T{};
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != static_cast<Py_ssize_t>(N)) return false;
    Py_ssize_t next = 0;
    return std::apply(
        [&](auto&... field) { return (load_field(PyTuple_GET_ITEM(source.ptr(), next++), field) && ...); },
        fields<N>(value));
  }
};

template <class E>
struct WordCaster {
  PYBIND11_TYPE_CASTER(E, py::detail::const_name("str"));

  bool load(py::handle source, bool) {
    for (size_t i = 0; PyUnicode_Check(source.ptr()) && i < kWords<E>.size(); ++i) {
      if (PyUnicode_CompareWithASCIIString(source.ptr(), kWords<E>[i]) != 0) continue;
      value = static_cast<E>(i);
      return true;
    }
    return false;
  }
};

}  // namespace lgk

namespace pybind11::detail {
template <class T>
struct type_caster<lgk::Pointer<T>> {
  PYBIND11_TYPE_CASTER(lgk::Pointer<T>, const_name("address"));

  bool load(handle source, bool convert) {
    make_caster<std::uintptr_t> number;
    if (!number.load(source, convert)) return false;
    value.address = reinterpret_cast<T*>(static_cast<std::uintptr_t>(number));
    return true;
  }
};
}  // namespace pybind11::detail

// Structs with `count` fields that come as tuples, and enumerations that come as words. Outside of every namespace.
#define LGK_TUPLE(Type, count) \
  template <>                  \
  struct pybind11::detail::type_caster<Type> : lgk::TupleCaster<Type, count> {};
#define LGK_WORDS(Type, ...)                                  \
  template <>                                                 \
  inline constexpr std::array lgk::kWords<Type>{__VA_ARGS__}; \
  template <>                                                 \
  struct pybind11::detail::type_caster<Type> : lgk::WordCaster<Type> {};
