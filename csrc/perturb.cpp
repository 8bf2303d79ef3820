// perturb_: the norm over all gradients, then one step along them.
#include <cmath>

#include "ops.h"

namespace infer_fast {
namespace {

constexpr int64_t kBlock = 4096;  // elements summed in float32 before double takes over

double sum_of_squares(const float* values, int64_t count) {
  double total = 0.0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = first + kBlock < count ? first + kBlock : count;
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = first; i < last; ++i) part += values[i] * values[i];
    total += part;
  }
  return total;
}

}  // namespace

void perturb(const std::vector<float*>& params, const std::vector<const float*>& grads,
             const std::vector<int64_t>& sizes, double rho, int threads) {
  const int64_t count = static_cast<int64_t>(params.size());
  std::vector<double> squares(params.size());
  parallel_ranges(count, threads, 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      squares[static_cast<size_t>(t)] = sum_of_squares(grads[static_cast<size_t>(t)], sizes[static_cast<size_t>(t)]);
  });
  double total = 0.0;
  for (double square : squares) total += square;
  const float factor = static_cast<float>(rho / (std::sqrt(total) + 1e-12));
  parallel_ranges(count, threads, 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* param = params[static_cast<size_t>(t)];
      const float* grad = grads[static_cast<size_t>(t)];
      for (int64_t i = 0; i < sizes[static_cast<size_t>(t)]; ++i) param[i] += factor * grad[i];
    }
  });
}

}  // namespace infer_fast
