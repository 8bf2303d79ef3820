// infer_fast._native: checks every argument, releases the GIL, and calls the op. Pointers come as Python integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "ops.h"

namespace py = pybind11;

namespace {

using infer_fast::BnMatchArguments;
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

// x, residual, weight, bias, running_mean, running_var, mean, var, mask, y, penalty, grad_y, grad_penalty, grad_x,
// grad_residual, in this order; 0 where an argument is not given.
using BnMatchPointers = std::array<std::uintptr_t, 15>;

BnMatchArguments bn_match_arguments(const BnMatchPointers& p, double eps, double r_var, int64_t lanes, int64_t batch,
                                    int64_t channels, int64_t plane, bool is_bfloat16, bool channels_last,
                                    int activation, int threads) {
  require(lanes >= 1, "bn_match: lanes must be at least 1");
  require(batch >= 0 && channels >= 0 && plane >= 0, "bn_match: a size is negative");
  require(activation >= 0 && activation <= 3, "bn_match: activation must be 0..3");
  require(threads >= 1, "bn_match: threads must be at least 1");
  return {pointer<const void>(p[0]),
          pointer<const void>(p[1]),
          pointer<const float>(p[2]),
          pointer<const float>(p[3]),
          pointer<const float>(p[4]),
          pointer<const float>(p[5]),
          pointer<float>(p[6]),
          pointer<float>(p[7]),
          pointer<uint8_t>(p[8]),
          pointer<void>(p[9]),
          pointer<float>(p[10]),
          pointer<const void>(p[11]),
          pointer<const float>(p[12]),
          pointer<void>(p[13]),
          pointer<void>(p[14]),
          eps,
          r_var,
          lanes,
          batch,
          channels,
          plane,
          is_bfloat16,
          channels_last,
          static_cast<infer_fast::Activation>(activation)};
}

bool is_empty(const BnMatchArguments& a) { return a.batch == 0 || a.channels == 0 || a.plane == 0; }

void bn_match_forward(const BnMatchPointers& pointers, double eps, double r_var, int64_t lanes, int64_t batch,
                      int64_t channels, int64_t plane, bool is_bfloat16, bool channels_last, int activation,
                      int threads) {
  const auto a = bn_match_arguments(pointers, eps, r_var, lanes, batch, channels, plane, is_bfloat16, channels_last,
                                    activation, threads);
  require(!is_empty(a), "bn_match: x is empty");
  require(a.x && a.running_mean && a.running_var && a.mean && a.var && a.y && a.penalty,
          "bn_match: x, the running and batch statistics, y and penalty must not be null");
  py::gil_scoped_release release;
  infer_fast::bn_match_forward(a, threads);
}

void bn_match_backward(const BnMatchPointers& pointers, double eps, double r_var, int64_t lanes, int64_t batch,
                       int64_t channels, int64_t plane, bool is_bfloat16, bool channels_last, int activation,
                       int threads) {
  const auto a = bn_match_arguments(pointers, eps, r_var, lanes, batch, channels, plane, is_bfloat16, channels_last,
                                    activation, threads);
  require(!is_empty(a), "bn_match: x is empty");
  require(a.x && a.running_mean && a.running_var && a.mean && a.var && a.grad_y && a.grad_penalty && a.grad_x,
          "bn_match: x, the running and batch statistics and the gradients must not be null");
  const bool gates = a.activation == infer_fast::Activation::relu || a.activation == infer_fast::Activation::relu6;
  require(!a.grad_residual || !gates || a.mask, "bn_match: a residual's backward with relu or relu6 needs the mask");
  require(!a.grad_residual || a.activation != infer_fast::Activation::silu || a.residual,
          "bn_match: a residual's backward with silu needs the residual");
  py::gil_scoped_release release;
  infer_fast::bn_match_backward(a, threads);
}

void perturb(const std::vector<std::uintptr_t>& params, const std::vector<std::uintptr_t>& grads,
             const std::vector<int64_t>& sizes, double rho, int threads) {
  require(params.size() == grads.size() && params.size() == sizes.size(),
          "perturb: params, grads and sizes must have one length");
  require(threads >= 1, "perturb: threads must be at least 1");
  std::vector<float*> p;
  std::vector<const float*> g;
  for (size_t i = 0; i < params.size(); ++i) {
    require(sizes[i] >= 0, "perturb: a size is negative");
    require(sizes[i] == 0 || (params[i] && grads[i]), "perturb: a tensor must not be null");
    p.push_back(pointer<float>(params[i]));
    g.push_back(pointer<const float>(grads[i]));
  }
  py::gil_scoped_release release;
  infer_fast::perturb(p, g, sizes, rho, threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The CPU backend of infer_fast.ops: raw pointers in, no torch headers.";
  module.def("compose", &compose, "See infer_fast.ops.compose.");
  module.def("bn_match_forward", &bn_match_forward, "See infer_fast.ops.bn_match.");
  module.def("bn_match_backward", &bn_match_backward, "See infer_fast.ops.bn_match.");
  module.attr("BN_MATCH_SMALL_PLANE") = infer_fast::kBnMatchSmallPlane;
  module.def("perturb", &perturb, "See infer_fast.ops.perturb_.");
}
