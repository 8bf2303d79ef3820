// infer_fast._native: checks every argument, releases the GIL, and calls the op.
//
// A tensor comes as (address, bytes), an absent one as (0, 0): no torch headers, and no read or write beyond what the
// caller says is there.
#ifdef __linux__
#include <malloc.h>
#endif

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "ops.h"

namespace py = pybind11;

namespace {

using infer_fast::BnMatchArguments;
using infer_fast::ComposeArguments;
using Buffer = std::pair<std::uintptr_t, int64_t>;

constexpr int kThreadsPerCore = 4;

void require(bool condition, const std::string& sentence) {
  if (!condition) throw std::invalid_argument(sentence);
}

// The product of sizes; an error if one is negative or the product does not fit.
int64_t product(const char* what, std::initializer_list<int64_t> sizes) {
  int64_t total = 1;
  for (int64_t size : sizes) {
    require(size >= 0, std::string(what) + ": a size is negative");
    require(size == 0 || total <= std::numeric_limits<int64_t>::max() / 16 / size,
            std::string(what) + ": the sizes are too large");
    total *= size;
  }
  return total;
}

// The buffer as a pointer to `count` elements of `size` bytes; it must be there and have just these bytes.
template <typename T>
T* needed(const char* name, const Buffer& buffer, int64_t count, int64_t size = sizeof(T)) {
  require(count == 0 || buffer.first != 0, std::string(name) + " must not be null");
  require(buffer.second == count * size, std::string(name) + " has " + std::to_string(buffer.second) +
                                             " bytes, expected " + std::to_string(count * size));
  return reinterpret_cast<T*>(buffer.first);
}

template <typename T>
T* optional(const char* name, const Buffer& buffer, int64_t count, int64_t size = sizeof(T)) {
  return buffer.first == 0 && buffer.second == 0 ? nullptr : needed<T>(name, buffer, count, size);
}

// As many threads as are worth having: results don't depend on their number, and each has memory of its own.
int bounded(const char* what, int threads) {
  require(threads >= 1, std::string(what) + ": threads must be at least 1");
  const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
  return static_cast<int>(std::min<int64_t>(threads, int64_t{kThreadsPerCore} * cores));
}

void check_index(const char* name, const int64_t* index, int64_t count, int64_t low, int64_t high) {
  for (int64_t i = 0; i < count; ++i)
    require(index[i] >= low && index[i] < high, std::string(name) + "[" + std::to_string(i) +
                                                    "] = " + std::to_string(index[i]) + " is out of range " +
                                                    std::to_string(low) + ".." + std::to_string(high - 1));
}

// The order in which compose takes its buffers.
namespace compose_buffer {
enum { base, base_index, compensators, scale, offset, compensator_index, shift, flip, lam, partner, out, count };
}

void compose(const std::array<Buffer, compose_buffer::count>& b, bool out_is_bfloat16, int64_t batch,
             int64_t base_count, int64_t compensator_count, int64_t height, int64_t width, std::array<float, 3> mean,
             std::array<float, 3> std, int threads) {
  namespace at = compose_buffer;
  threads = bounded("compose", threads);
  const int64_t image = product("compose", {3, height, width});
  ComposeArguments a{};
  a.base = needed<const uint8_t>("compose: base", b[at::base], product("compose", {base_count, image}));
  a.base_index = needed<const int64_t>("compose: base_index", b[at::base_index], product("compose", {batch}));
  a.compensators = optional<const uint8_t>("compose: compensators", b[at::compensators],
                                           product("compose", {compensator_count, image}));
  if (a.compensators) {
    const int64_t channels = product("compose", {compensator_count, 3});
    a.scale = needed<const float>("compose: scale", b[at::scale], channels);
    a.offset = needed<const float>("compose: offset", b[at::offset], channels);
    a.compensator_index = needed<const int64_t>("compose: compensator_index", b[at::compensator_index], batch);
  }
  a.shift = optional<const int64_t>("compose: shift", b[at::shift], product("compose", {batch, 2}));
  a.flip = optional<const bool>("compose: flip", b[at::flip], batch);
  a.lam = optional<const float>("compose: lam", b[at::lam], batch);
  a.partner = optional<const int64_t>("compose: partner", b[at::partner], batch);
  require((a.lam == nullptr) == (a.partner == nullptr), "compose: lam and partner go together");
  a.out = needed<void>("compose: out", b[at::out], product("compose", {batch, image}), out_is_bfloat16 ? 2 : 4);
  a.out_is_bfloat16 = out_is_bfloat16;
  a.batch = batch;
  a.base_count = base_count;
  a.compensator_count = compensator_count;
  a.height = height;
  a.width = width;
  a.mean = mean;
  a.std = std;
  check_index("compose: base_index", a.base_index, batch, 0, base_count);
  if (a.compensators) check_index("compose: compensator_index", a.compensator_index, batch, -1, compensator_count);
  if (a.partner) check_index("compose: partner", a.partner, batch, 0, batch);
  if (batch == 0 || image == 0) return;
  py::gil_scoped_release release;
  infer_fast::compose(a, threads);
}

// The order in which bn_match takes its buffers: first those of both passes, then each pass's own.
namespace bn_match_buffer {
enum { x, residual, weight, bias, running_mean, running_var, mean, var, mask, shared };
enum { y = shared, penalty, forward_count };
enum { grad_y = shared, grad_penalty, grad_x, grad_residual, backward_count };
}  // namespace bn_match_buffer

template <size_t count>
BnMatchArguments bn_match_arguments(const std::array<Buffer, count>& b, double eps, double r_var, int64_t lanes,
                                    int64_t batch, int64_t channels, int64_t plane, bool is_bfloat16,
                                    bool channels_last, int activation) {
  namespace at = bn_match_buffer;
  require(lanes >= 1, "bn_match: lanes must be at least 1");
  require(activation >= 0 && activation <= 3, "bn_match: activation must be 0..3");

  const int64_t elements = product("bn_match", {lanes, batch, channels, plane});
  require(elements > 0, "bn_match: x is empty");
  const int64_t size = is_bfloat16 ? 2 : 4, statistics = lanes * channels;
  BnMatchArguments a{};
  a.lanes = lanes;
  a.batch = batch;
  a.channels = channels;
  a.plane = plane;
  a.is_bfloat16 = is_bfloat16;
  a.channels_last = channels_last;
  a.activation = static_cast<infer_fast::Activation>(activation);
  a.eps = eps;
  a.r_var = r_var;
  a.x = needed<const void>("bn_match: x", b[at::x], elements, size);
  a.residual = optional<const void>("bn_match: residual", b[at::residual], elements, size);
  a.weight = optional<const float>("bn_match: weight", b[at::weight], channels);
  a.bias = optional<const float>("bn_match: bias", b[at::bias], channels);
  a.running_mean = needed<const float>("bn_match: running_mean", b[at::running_mean], channels);
  a.running_var = needed<const float>("bn_match: running_var", b[at::running_var], channels);
  a.mean = needed<float>("bn_match: mean", b[at::mean], statistics);
  a.var = needed<float>("bn_match: var", b[at::var], statistics);
  a.mask = optional<uint8_t>("bn_match: mask", b[at::mask], infer_fast::bn_match_mask_bytes(a));
  return a;
}

int64_t bn_match_mask_bytes(int64_t lanes, int64_t batch, int64_t channels, int64_t plane, bool channels_last) {
  if (product("bn_match", {lanes, batch, channels, plane}) == 0) return 0;
  BnMatchArguments a{};
  a.lanes = lanes;
  a.batch = batch;
  a.channels = channels;
  a.plane = plane;
  a.channels_last = channels_last;
  return infer_fast::bn_match_mask_bytes(a);
}

bool gates(const BnMatchArguments& a) {
  return a.activation == infer_fast::Activation::relu || a.activation == infer_fast::Activation::relu6;
}

void bn_match_forward(const std::array<Buffer, bn_match_buffer::forward_count>& b, double eps, double r_var,
                      int64_t lanes, int64_t batch, int64_t channels, int64_t plane, bool is_bfloat16,
                      bool channels_last, int activation, int threads) {
  namespace at = bn_match_buffer;
  threads = bounded("bn_match", threads);
  auto a = bn_match_arguments(b, eps, r_var, lanes, batch, channels, plane, is_bfloat16, channels_last, activation);
  a.y = needed<void>("bn_match: y", b[at::y], lanes * batch * channels * plane, is_bfloat16 ? 2 : 4);
  a.penalty = needed<float>("bn_match: penalty", b[at::penalty], lanes);
  py::gil_scoped_release release;
  infer_fast::bn_match_forward(a, threads);
}

void bn_match_backward(const std::array<Buffer, bn_match_buffer::backward_count>& b, double eps, double r_var,
                       int64_t lanes, int64_t batch, int64_t channels, int64_t plane, bool is_bfloat16,
                       bool channels_last, int activation, int threads) {
  namespace at = bn_match_buffer;
  threads = bounded("bn_match", threads);
  auto a = bn_match_arguments(b, eps, r_var, lanes, batch, channels, plane, is_bfloat16, channels_last, activation);
  const int64_t elements = lanes * batch * channels * plane, size = is_bfloat16 ? 2 : 4;
  a.grad_y = needed<const void>("bn_match: grad_y", b[at::grad_y], elements, size);
  a.grad_penalty = needed<const float>("bn_match: grad_penalty", b[at::grad_penalty], lanes);
  a.grad_x = needed<void>("bn_match: grad_x", b[at::grad_x], elements, size);
  a.grad_residual = optional<void>("bn_match: grad_residual", b[at::grad_residual], elements, size);
  require(!a.grad_residual || !gates(a) || a.mask, "bn_match: a residual's backward with relu or relu6 needs the mask");
  require(!a.grad_residual || a.activation != infer_fast::Activation::silu || a.residual,
          "bn_match: a residual's backward with silu needs the residual");
  require(!a.residual || a.grad_residual, "bn_match: a residual needs room for its gradient");
  py::gil_scoped_release release;
  infer_fast::bn_match_backward(a, threads);
}

void perturb(const std::vector<Buffer>& params, const std::vector<Buffer>& grads, double rho, int threads) {
  require(params.size() == grads.size(), "perturb: params and grads must have one length");
  threads = bounded("perturb", threads);
  std::vector<float*> p;
  std::vector<const float*> g;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t count = params[i].second / 4;
    require(count >= 0, "perturb: a size is negative");
    p.push_back(needed<float>("perturb: a parameter", params[i], count));
    g.push_back(needed<const float>("perturb: a gradient", grads[i], count));
    sizes.push_back(count);
  }
  py::gil_scoped_release release;
  infer_fast::perturb(p, g, sizes, rho, threads);
}

// By default glibc gives a freed tensor's pages back to the system, and the next tensor pays for getting them again:
// more than bn_match itself takes. Process-wide, so only our own programs ask for it.
bool keep_freed_memory() {
#ifdef __GLIBC__
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The CPU backend of infer_fast.ops: (address, bytes) pairs in, no torch headers.";
  module.def("compose", &compose, "See infer_fast.ops.compose.");
  module.def("bn_match_forward", &bn_match_forward, "See infer_fast.ops.bn_match.");
  module.def("bn_match_backward", &bn_match_backward, "See infer_fast.ops.bn_match.");
  module.def("bn_match_mask_bytes", &bn_match_mask_bytes,
             "Bytes of the mask of x, from (lanes, batch, channels, plane, channels_last).");
  module.def("keep_freed_memory", &keep_freed_memory,
             "Has the process keep freed memory for its next tensors. False where the C library can't.");
  module.def("limit_instruction_set", &infer_fast::limit_instruction_set,
             "0: portable code, 1: at most AVX2, 2: at most AVX-512. Returns what is in use. For tests.");
  module.def("stream_results_from", &infer_fast::stream_results_from,
             "bn_match writes results of so many bytes past the caches; negative: as it does by itself. For tests.");
  module.def("perturb", &perturb, "See infer_fast.ops.perturb_.");
}
