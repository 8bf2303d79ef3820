// The CPU backend: raw pointers in, no torch headers, so that one build serves every torch.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace infer_fast {

// bfloat16 kept as its 16 bits; rounding is to nearest, ties to even, NaN stays NaN.
struct bfloat16 {
  uint16_t bits;
};

inline void store(float value, float* out) { *out = value; }

inline void store(float value, bfloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
    return;
  }
  bits += 0x7fffu + ((bits >> 16) & 1u);
  out->bits = static_cast<uint16_t>(bits >> 16);
}

// Runs body(begin, end) over equal ranges of [0, count), on at most `threads` threads, this one among them.
template <typename Body>
void parallel_ranges(int64_t count, int threads, int64_t least_per_thread, const Body& body) {
  int64_t parts = least_per_thread > 0 ? count / least_per_thread : count;
  if (parts > threads) parts = threads;
  if (parts <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(parts - 1));
  for (int64_t p = 1; p < parts; ++p)
    others.emplace_back([&body, p, parts, count] { body(count * p / parts, count * (p + 1) / parts); });
  body(int64_t{0}, count / parts);
  for (auto& thread : others) thread.join();
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

}  // namespace infer_fast
