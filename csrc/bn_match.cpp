// bn_match on the CPU: one pass forward (normalise, residual, activation, statistics), one pass backward.
//
// Work is split into pieces that don't depend on the number of threads, and their sums are added in a fixed order, so
// the result is the same for any number of threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "bn_match_cut.h"
#include "bn_match_statistics.h"
#include "ops.h"

#ifdef __GNUC__
#define INFER_FAST_INSIDE __attribute__((always_inline))
#define INFER_FAST_APART __attribute__((noinline))
#else
#define INFER_FAST_INSIDE
#define INFER_FAST_APART
#endif

namespace infer_fast {
namespace {

constexpr int64_t kLeastPerThread = 16384;  // elements worth another thread

// Sums laid out as a block of a row, added up by channel.
void gather(const BnMatchArguments& a, const Rows& r, int64_t first_parameter, const float* sums, double* out) {
  if (a.channels_last) {
    for (int64_t i = 0; i < r.parameters; i += a.channels)
      for (int64_t c = 0; c < a.channels; ++c) out[c] += sums[i + c];
    return;
  }
  const int64_t first = first_parameter / a.plane, last = std::min(a.channels, first + r.width / a.plane);
  for (int64_t c = first; c < last; ++c) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < a.plane; ++i) total += sums[(c - first) * a.plane + i];
    out[c] += total;
  }
}

// What one pass works with: the shape, the parameters, and where everything lies.
struct Pass {
  const BnMatchArguments& arguments;
  const Rows rows;
  const Patches patches;
  const float *mean, *scale, *bias;  // per channel, or as the elements of a row
  const float *a, *b;                // backward: likewise, for each lane
  double *sum, *square;              // forward: per channel of each image, group of images, or piece of rows
  bool streams;                      // results are written past the caches
};

// One thread's own room: the sums of a row's width, twice, then for the elements of a run of rows (of a part of a
// plane) the flags and two blocks of results.
struct Scratch {
  float* sums;
  uint8_t* flags;
  float *block, *second_block;
};

// Does the planes, patches or pieces begin..end.
using Work = void (*)(const Pass&, const Scratch&, int64_t begin, int64_t end);

// By how the tensor is cut.
struct Works {
  Work planes, patches, pieces;
};

struct Variant {
  Works forward, backward;
};

#define INFER_FAST_TARGET generic
#include "bn_match_target.h"
#undef INFER_FAST_TARGET

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define INFER_FAST_X86 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define INFER_FAST_TARGET avx2
#include "bn_match_target.h"
#undef INFER_FAST_TARGET
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define INFER_FAST_TARGET avx512
#include "bn_match_target.h"
#undef INFER_FAST_TARGET
#pragma GCC pop_options
#endif

std::atomic<int> instruction_limit{2};

// 0: portable code, 1: AVX2, 2: AVX-512.
int instruction_set() {
#ifdef INFER_FAST_X86
  static const int best = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                              ? 2
                              : (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0);
  return std::min(best, instruction_limit.load());
#else
  return 0;
#endif
}

template <typename Scalar>
Variant choose(Activation kind, bool with_residual) {
#ifdef INFER_FAST_X86
  const int level = instruction_set();
  if (level == 2) return avx512::variant<Scalar>(kind, with_residual);
  if (level == 1) return avx2::variant<Scalar>(kind, with_residual);
#endif
  return generic::variant<Scalar>(kind, with_residual);
}

Variant choose(const BnMatchArguments& a) {
  const bool with_residual = a.residual != nullptr || a.grad_residual != nullptr;
  return a.is_bfloat16 ? choose<bfloat16>(a.activation, with_residual) : choose<float>(a.activation, with_residual);
}

void run(const Pass& pass, const Works& works, int threads) {
  const BnMatchArguments& a = pass.arguments;
  const Rows& r = pass.rows;
  const int64_t each = kTogether * kPart, flags_each = std::max(r.width * r.run, each) + 8;
  const int64_t sums_each = by_rows(a) ? 2 * r.width : by_patches(a) ? 2 * kFold * a.channels : 0;
  const int64_t floats_each = sums_each + 2 * each;
  std::unique_ptr<float[]> floats(new float[static_cast<size_t>(floats_each * threads)]);  // written before it is read
  std::vector<uint8_t> flags(static_cast<size_t>(flags_each * threads));
  const Work work = by_rows(a) ? works.pieces : by_patches(a) ? works.patches : works.planes;
  const int64_t count = by_rows(a)      ? a.lanes * r.per_lane * r.blocks
                        : by_patches(a) ? a.lanes * pass.patches.groups * pass.patches.blocks
                                        : a.lanes * a.batch * a.channels;
  const int64_t elements = std::max<int64_t>(1, a.lanes * a.batch * a.channels * a.plane / count);
  parallel_ranges(count, threads, kLeastPerThread / elements, [&](int64_t part, int64_t begin, int64_t end) {
    float *own = floats.get() + part * floats_each, *block = own + sums_each;
    const Scratch scratch{own, flags.data() + part * flags_each, block, block + each};
    work(pass, scratch, begin, end);
#ifdef __SSE2__
    if (pass.streams) _mm_sfence();  // writes past the caches are in no order with those that tell of them
#endif
  });
}

}  // namespace

int limit_instruction_set(int limit) {
  instruction_limit = std::max(0, limit);
  return instruction_set();
}

void bn_match_forward(const BnMatchArguments& a, int threads) {
  const Rows rows = rows_of(a);
  const Patches patches = patches_of(a, threads);
  const Parameters parameters(a, rows);
  const int64_t slots = by_rows(a) ? rows.per_lane : by_patches(a) ? patches.groups : a.batch;
  std::vector<double> sum(static_cast<size_t>(a.lanes * slots * a.channels)), square(sum.size());
  const Pass pass{a,
                  rows,
                  patches,
                  parameters.mean.data(),
                  parameters.scale.data(),
                  parameters.bias.data(),
                  /*a=*/nullptr,
                  /*b=*/nullptr,
                  sum.data(),
                  square.data(),
                  streams(a)};
  run(pass, choose(a).forward, threads);
  finish_statistics(a, sum, square, slots);
}

void bn_match_backward(const BnMatchArguments& g, int threads) {
  const Rows rows = rows_of(g);
  const Parameters parameters(g, rows);
  std::vector<float> a(static_cast<size_t>(g.lanes * parameter_count(g, rows))), b(a.size());
  gradient_coefficients(g, rows, a, b);
  const Pass pass{g,
                  rows,
                  patches_of(g, threads),
                  parameters.mean.data(),
                  parameters.scale.data(),
                  parameters.bias.data(),
                  a.data(),
                  b.data(),
                  /*sum=*/nullptr,
                  /*square=*/nullptr,
                  streams(g)};
  run(pass, choose(g).backward, threads);
}

}  // namespace infer_fast
