// infer_fast._native: checks every argument, releases the GIL, and calls the op. Pointers come as Python integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "ops.h"

namespace py = pybind11;

namespace {

using infer_fast::ComposeArguments;

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require(bool condition, const std::string& sentence) {
  if (!condition) throw std::invalid_argument(sentence);
}

void check_index(const char* name, const int64_t* index, int64_t count, int64_t low, int64_t high) {
  for (int64_t i = 0; i < count; ++i)
    require(index[i] >= low && index[i] < high,
            std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(index[i]) + " is out of range " +
                std::to_string(low) + ".." + std::to_string(high - 1));
}

void compose(std::uintptr_t base, std::uintptr_t base_index, std::uintptr_t compensators, std::uintptr_t scale,
             std::uintptr_t offset, std::uintptr_t compensator_index, std::uintptr_t shift, std::uintptr_t flip,
             std::uintptr_t lam, std::uintptr_t partner, std::uintptr_t out, bool out_is_bfloat16, int64_t batch,
             int64_t base_count, int64_t compensator_count, int64_t height, int64_t width, std::array<float, 3> mean,
             std::array<float, 3> std, int threads) {
  require(batch >= 0 && base_count >= 0 && compensator_count >= 0 && height >= 0 && width >= 0,
          "compose: a size is negative");
  require(threads >= 1, "compose: threads must be at least 1");
  if (batch == 0 || height == 0 || width == 0) return;
  require(base && base_index && out, "compose: base, base_index and out must not be null");
  require(!compensators || (scale && offset && compensator_index),
          "compose: compensators need scale, offset and compensator_index");
  require((lam == 0) == (partner == 0), "compose: lam and partner go together");

  const ComposeArguments arguments{pointer<const uint8_t>(base),
                                   pointer<const int64_t>(base_index),
                                   pointer<const uint8_t>(compensators),
                                   pointer<const float>(scale),
                                   pointer<const float>(offset),
                                   pointer<const int64_t>(compensator_index),
                                   pointer<const int64_t>(shift),
                                   pointer<const bool>(flip),
                                   pointer<const float>(lam),
                                   pointer<const int64_t>(partner),
                                   pointer<void>(out),
                                   out_is_bfloat16,
                                   batch,
                                   base_count,
                                   compensator_count,
                                   height,
                                   width,
                                   mean,
                                   std};
  check_index("compose: base_index", arguments.base_index, batch, 0, base_count);
  if (compensators) check_index("compose: compensator_index", arguments.compensator_index, batch, -1, compensator_count);
  if (partner) check_index("compose: partner", arguments.partner, batch, 0, batch);
  py::gil_scoped_release release;
  infer_fast::compose(arguments, threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The CPU backend of infer_fast.ops: raw pointers in, no torch headers.";
  module.def("compose", &compose, "See infer_fast.ops.compose.");
}
