// perturb_: the norm over all gradients, then one step along them.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace infer_fast {
namespace {

constexpr int64_t kBlock = 4096;  // elements of a block; summed in float32, the blocks in double
constexpr int64_t kLeastPerThread = 8;

// Where the blocks of the tensors lie: `first[t]` is the number of blocks before tensor t, `first.back()` of all.
std::vector<int64_t> blocks_of(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> first{0};
  for (int64_t size : sizes) first.push_back(first.back() + (size + kBlock - 1) / kBlock);
  return first;
}

// Calls body(tensor, first element, last element, block) for the blocks begin..end.
template <typename Body>
void each_block(const std::vector<int64_t>& first, const std::vector<int64_t>& sizes, int64_t begin, int64_t end,
                const Body& body) {
  size_t tensor = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
  for (int64_t block = begin; block < end; ++block) {
    while (block >= first[tensor + 1]) ++tensor;
    const int64_t from = (block - first[tensor]) * kBlock;
    body(tensor, from, std::min(from + kBlock, sizes[tensor]), block);
  }
}

float sum_of_squares(const float* values, int64_t from, int64_t to) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = from; i < to; ++i) sum += values[i] * values[i];
  return sum;
}

}  // namespace

void perturb(const std::vector<float*>& params, const std::vector<const float*>& grads,
             const std::vector<int64_t>& sizes, double rho, int threads) {
  const std::vector<int64_t> first = blocks_of(sizes);
  std::vector<float> squares(static_cast<size_t>(first.back()));
  parallel_ranges(first.back(), threads, kLeastPerThread, [&](int64_t, int64_t begin, int64_t end) {
    each_block(first, sizes, begin, end, [&](size_t tensor, int64_t from, int64_t to, int64_t block) {
      squares[static_cast<size_t>(block)] = sum_of_squares(grads[tensor], from, to);
    });
  });
  double total = 0.0;
  for (float square : squares) total += square;
  const float factor = static_cast<float>(rho / (std::sqrt(total) + 1e-12));
  parallel_ranges(first.back(), threads, kLeastPerThread, [&](int64_t, int64_t begin, int64_t end) {
    each_block(first, sizes, begin, end, [&](size_t tensor, int64_t from, int64_t to, int64_t) {
      float* param = params[tensor];
      const float* grad = grads[tensor];
#pragma omp simd
      for (int64_t i = from; i < to; ++i) param[i] += factor * grad[i];
    });
  });
}

}  // namespace infer_fast
