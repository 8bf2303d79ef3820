// The CPU backend: raw pointers in, no torch headers, so that one build serves every torch.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#ifndef _OPENMP
#include <thread>
#endif

namespace infer_fast {

// bfloat16 kept as its 16 bits.
struct bfloat16 {
  uint16_t bits;
};

// Runs body(part, begin, end) over equal ranges of [0, count), in fewer parts than `threads` if there is little to do;
// the first part runs on this thread. With OpenMP these are the very threads that torch uses (one libgomp in the
// process), so none compete for a core.
template <typename Body>
void parallel_ranges(int64_t count, int threads, int64_t least_per_thread, const Body& body) {
  int64_t parts = least_per_thread > 1 ? count / least_per_thread : count;
  if (parts > threads) parts = threads;
  if (parts <= 1) {
    if (count > 0) body(int64_t{0}, int64_t{0}, count);
    return;
  }
#ifdef _OPENMP
  const int team = static_cast<int>(parts);
#pragma omp parallel for num_threads(team) schedule(static, 1)
  for (int64_t p = 0; p < parts; ++p) body(p, count * p / parts, count * (p + 1) / parts);
#else
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(parts - 1));
  for (int64_t p = 1; p < parts; ++p)
    others.emplace_back([&body, p, parts, count] { body(p, count * p / parts, count * (p + 1) / parts); });
  body(int64_t{0}, int64_t{0}, count / parts);
  for (auto& thread : others) thread.join();
#endif
}

// The arguments of infer_fast.ops.compose; a null pointer means that the argument was not given.
struct ComposeArguments {
  const uint8_t* base;               // (N, 3, H, W)
  const int64_t* base_index;         // (B,)
  const uint8_t* compensators;       // (K, 3, H, W) or null
  const float* scale;                // (K, 3)
  const float* offset;               // (K, 3)
  const int64_t* compensator_index;  // (B,), -1 for none
  const int64_t* shift;              // (B, 2) or null
  const bool* flip;                  // (B,) or null
  const float* lam;                  // (B,) or null
  const int64_t* partner;            // (B,) with lam
  void* out;                         // (B, 3, H, W)
  bool out_is_bfloat16;
  int64_t batch, base_count, compensator_count, height, width;
  std::array<float, 3> mean, std;
};

void compose(const ComposeArguments& arguments, int threads);

enum class Activation { none = 0, relu = 1, relu6 = 2, silu = 3 };

// The arguments of infer_fast.ops.bn_match, forward and backward. Images of one lane lie side by side; a tensor is
// either contiguous (plane = H*W elements per channel) or channels_last (rows of C elements).
struct BnMatchArguments {
  const void* x;         // (lanes*B, C, H, W)
  const void* residual;  // like x, or null
  const float* weight;   // (C,) or null
  const float* bias;     // (C,) or null
  const float* running_mean;
  const float* running_var;
  float* mean;     // (lanes, C): mean - running_mean, written by forward, read by backward
  float* var;      // (lanes, C): biased variance, likewise
  uint8_t* mask;   // one bit per element where act' is 1, written by forward with a residual and relu or
                   // relu6; a lane's bits (channels_last), an image's, or a large plane's begin at a byte of their own
  void* y;         // forward: like x
  float* penalty;  // forward: (lanes,)
  const void* grad_y;         // backward: like x
  const float* grad_penalty;  // backward: (lanes,)
  void* grad_x;               // backward: like x
  void* grad_residual;        // backward: like x, or null
  double eps, r_var;
  int64_t lanes, batch, channels, plane;
  bool is_bfloat16, channels_last;
  Activation activation;
};

// Bytes of the mask.
int64_t bn_match_mask_bytes(const BnMatchArguments& arguments);

// Lets bn_match use no newer instructions than 0: portable code, 1: AVX2, 2: AVX-512; returns what it then uses.
int limit_instruction_set(int limit);

// Has bn_match write results of so many bytes past the caches; negative: as it does by itself, from half the last
// cache.
void stream_results_from(int64_t bytes);

void bn_match_forward(const BnMatchArguments& arguments, int threads);
void bn_match_backward(const BnMatchArguments& arguments, int threads);

// theta += rho * g / (||g||_2 + 1e-12) over lists of contiguous float32 tensors; the norm in double.
void perturb(const std::vector<float*>& params, const std::vector<const float*>& grads,
             const std::vector<int64_t>& sizes, double rho, int threads);

}  // namespace infer_fast
