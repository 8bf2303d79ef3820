// bn_match on the CPU: one pass forward (normalise, residual, activation, statistics), one pass backward.
//
// Work is split into pieces that don't depend on the number of threads, and their sums are added in a fixed order, so
// the result is the same for any number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

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

constexpr int64_t kRowPiece = 16384;        // elements of one piece of rows, at least
constexpr int64_t kPieces = 64;             // of a lane, to aim for beyond that
constexpr int64_t kChunk = 128;             // elements of a wide row that are taken together
constexpr int64_t kWidth = 64;              // channels_last rows shorter than this are taken several at a time
constexpr int64_t kBlock = 1024;            // elements of an image of the smallest planes that are taken together
constexpr int64_t kFold = 16;               // partial sums of a small plane
constexpr int64_t kTogether = 4;            // rows, or stretches of kFold elements, that are taken together
constexpr int64_t kImages = 16;             // images of small planes that are summed together, at most
constexpr int64_t kFoldedOnto = 256;        // elements that add to one of them, at most, before double takes over
constexpr int64_t kLeastPerThread = 16384;  // elements worth another thread
constexpr int64_t kUsualCache = 32 << 20;   // bytes of the last cache where the system doesn't tell
constexpr int64_t kPart = 512;              // elements of a plane summed in float32 before double takes over

// How a tensor is read row by row, the images of one lane being one group. channels_last: a row is some pixels, and
// kTogether go together, so that their parameters are touched once; but where memory bounds the work (float32 results
// that go past the caches), processors read one row after the other faster, and then rows are longer.
// Contiguous with small planes: a row is one image, cut into blocks of whole planes. Parameters lie as the elements of
// one row do, so that a row is one loop without a branch.
struct Rows {
  int64_t width;           // elements of a row (of a block of it)
  int64_t pitch;           // elements from one row to the next
  int64_t blocks;          // blocks side by side in a row (1: rows are whole and lie side by side)
  int64_t rows;            // rows of one piece
  int64_t chunk;           // elements of a row that are taken together with those of the rows below
  bool together;           // whether they are
  int64_t run;             // rows that lie side by side and are taken in one call
  int64_t lane_rows;       // rows of a lane (the last may be short, channels_last)
  int64_t lane_elements;   // elements of a lane
  int64_t per_lane;        // pieces of a lane, one below another
  int64_t parameters;      // entries of the parameters: those of all blocks
};

// Contiguous planes of a few elements that don't fill registers are taken as rows, too.
bool by_rows(const BnMatchArguments& a) {
  return a.channels_last || (a.plane <= kBnMatchSmallPlane && a.plane % kFold != 0);
}

bool by_patches(const BnMatchArguments& a) { return !by_rows(a) && a.plane < kPart; }

int64_t up(int64_t count, int64_t each) { return (count + each - 1) / each; }

// How a contiguous tensor of small planes is cut. The images of a group are summed together, so the groups depend on
// the shape alone; blocks of channels only spread the work over the threads.
struct Patches {
  int64_t images;  // of a group (the last may be smaller)
  int64_t groups;  // of a lane's images
  int64_t blocks;  // of the channels
};

Patches patches_of(const BnMatchArguments& a, int threads) {
  const int64_t most = std::clamp<int64_t>(kFoldedOnto * kFold / a.plane, 1, kImages);
  const int64_t images = up(up(a.batch, up(a.batch, most)), kTogether) * kTogether;  // much the same in every group
  const int64_t groups = up(a.batch, images), all = a.lanes * groups;
  const int64_t blocks = all % threads == 0 || all >= 4 * threads ? 1 : up(4 * threads, all);
  return {images, groups, std::min(blocks, a.channels)};
}

// Bytes of the last cache that this processor's cores share, as Linux tells it (glibc's sysconf counts all of a socket's).
int64_t last_cache() {
  int64_t bytes = kUsualCache;
  for (int index = 0; index < 5; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    int64_t size = 0;
    char unit = 0;
    if (file >> size >> unit && size > 0) bytes = size << (unit == 'M' ? 20 : 10);
  }
  return bytes;
}

std::atomic<int64_t> streamed_bytes{-1};  // what stream_results_from() asked for; negative: half the last cache

// Results that the caches can't hold beside x until the next layer reads them are better written past them.
bool streams(const BnMatchArguments& a) {
  static const int64_t cache = last_cache();
  const int64_t asked = streamed_bytes.load();
  return a.lanes * a.batch * a.channels * a.plane * (a.is_bfloat16 ? 2 : 4) >= (asked < 0 ? cache / 2 : asked);
}

Rows rows_of(const BnMatchArguments& a) {
  Rows r{};
  const int64_t image = a.channels * a.plane;
  if (a.channels_last) {
    r.together = a.is_bfloat16 || !streams(a);
    int64_t pixels = std::max<int64_t>(1, (r.together ? kWidth : kPart) / a.channels);
    if (!r.together && pixels >= 4) pixels -= pixels % 4;  // a row begins where 16 bytes do
    r.width = r.pitch = r.parameters = a.channels * pixels;
    r.blocks = 1;
    r.run = 8;  // a multiple of 8 rows, so that each run's bits begin at a byte
    r.lane_elements = a.batch * image;
    const int64_t piece = std::clamp(r.lane_elements / kPieces, kRowPiece, 4 * kRowPiece);
    r.rows = std::max<int64_t>(1, piece / r.width / r.run) * r.run;
    r.lane_rows = up(r.lane_elements, r.width);
  } else if (by_rows(a)) {
    // A multiple of 8 planes, so that each block's bits begin at a byte.
    const int64_t planes = std::max<int64_t>(1, kBlock / a.plane / 8) * 8;
    r.width = std::min(planes * a.plane, image);
    r.pitch = r.parameters = image;
    r.blocks = up(image, r.width);
    r.run = 1;
    r.rows = std::max<int64_t>(1, kRowPiece / r.width);
    r.lane_elements = a.batch * image;
    r.lane_rows = a.batch;
  }
  // Chunks of whole cache lines, much the same; rows that begin within a line go whole, if they fit.
  if (r.width > 0) {
    const bool whole = r.width <= kChunk || (r.width % 32 != 0 && r.width <= kPart);
    r.chunk = whole ? r.width : up(up(r.width, up(r.width, kChunk)), 32) * 32;
  }
  r.per_lane = r.rows ? up(r.lane_rows, r.rows) : 0;
  return r;
}

// The byte of the mask where the bits of the element `at` begin. The bits of a lane (channels_last) or of an image
// begin at a byte of their own.
int64_t mask_offset(const BnMatchArguments& a, int64_t at) {
  const int64_t each = a.channels * a.plane * (a.channels_last ? a.batch : 1);
  return at / each * ((each + 7) / 8) + at % each / 8;
}

// values[c] of every channel, laid out as the parameters of a row.
void spread(const BnMatchArguments& a, const Rows& r, const float* values, float* out) {
  if (!by_rows(a)) {
    std::copy(values, values + a.channels, out);
  } else if (a.channels_last) {
    for (int64_t i = 0; i < r.parameters; i += a.channels) std::copy(values, values + a.channels, out + i);
  } else {
    for (int64_t c = 0; c < a.channels; ++c) std::fill(out + c * a.plane, out + (c + 1) * a.plane, values[c]);
  }
}

// The reverse: sums laid out as a block of a row, added up by channel.
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

// One thread's own room: the sums of a row's width, twice, then for the elements of a run of rows (of a part of a plane)
// the flags and two blocks of results.
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

int64_t parameter_count(const BnMatchArguments& a, const Rows& r) { return by_rows(a) ? r.parameters : a.channels; }

// The parameters, per channel or as the elements of a row.
struct Parameters {
  std::vector<float> mean, scale, bias;

  Parameters(const BnMatchArguments& a, const Rows& r) {
    const int64_t count = parameter_count(a, r);
    mean.resize(static_cast<size_t>(count));
    scale.resize(static_cast<size_t>(count));
    bias.resize(static_cast<size_t>(count));
    std::vector<float> scales(static_cast<size_t>(a.channels));
    for (int64_t c = 0; c < a.channels; ++c) {
      const double root = std::sqrt(static_cast<double>(a.running_var[c]) + a.eps);
      scales[static_cast<size_t>(c)] = static_cast<float>((a.weight ? static_cast<double>(a.weight[c]) : 1.0) / root);
    }
    spread(a, r, a.running_mean, mean.data());
    spread(a, r, scales.data(), scale.data());
    if (a.bias) spread(a, r, a.bias, bias.data());
  }
};

void finish_statistics(const BnMatchArguments& a, const std::vector<double>& sum, const std::vector<double>& square,
                       int64_t pieces_per_lane) {
  const double count = static_cast<double>(a.batch) * static_cast<double>(a.plane);
  std::vector<double> s(static_cast<size_t>(a.channels)), q(static_cast<size_t>(a.channels));
  for (int64_t lane = 0; lane < a.lanes; ++lane) {
    std::fill(s.begin(), s.end(), 0.0);
    std::fill(q.begin(), q.end(), 0.0);
    for (int64_t piece = lane * pieces_per_lane; piece < (lane + 1) * pieces_per_lane; ++piece)
      for (int64_t c = 0; c < a.channels; ++c) {
        s[static_cast<size_t>(c)] += sum[static_cast<size_t>(piece * a.channels + c)];
        q[static_cast<size_t>(c)] += square[static_cast<size_t>(piece * a.channels + c)];
      }
    double mean_norm = 0.0, var_norm = 0.0;
    for (int64_t c = 0; c < a.channels; ++c) {
      const double mean = s[static_cast<size_t>(c)] / count;
      double var = q[static_cast<size_t>(c)] / count - mean * mean;
      if (var < 0.0) var = 0.0;  // rounding; NaN stays
      const double difference = var - static_cast<double>(a.running_var[c]);
      a.mean[lane * a.channels + c] = static_cast<float>(mean);
      a.var[lane * a.channels + c] = static_cast<float>(var);
      mean_norm += mean * mean;
      var_norm += difference * difference;
    }
    a.penalty[lane] = static_cast<float>(a.r_var * std::sqrt(var_norm) + std::sqrt(mean_norm));
  }
}

// d penalty / d x = a + b * (x - running_mean) for each (lane, channel), times the penalty's own gradient.
void gradient_coefficients(const BnMatchArguments& g, const Rows& r, std::vector<float>& a, std::vector<float>& b) {
  const double count = static_cast<double>(g.batch) * static_cast<double>(g.plane);
  const int64_t entries = parameter_count(g, r);
  std::vector<float> of_channel_a(static_cast<size_t>(g.channels)), of_channel_b(of_channel_a.size());
  for (int64_t lane = 0; lane < g.lanes; ++lane) {
    double mean_norm = 0.0, var_norm = 0.0;
    for (int64_t c = 0; c < g.channels; ++c) {
      const double mean = g.mean[lane * g.channels + c];
      const double difference = static_cast<double>(g.var[lane * g.channels + c]) - g.running_var[c];
      mean_norm += mean * mean;
      var_norm += difference * difference;
    }
    mean_norm = std::sqrt(mean_norm);
    var_norm = std::sqrt(var_norm);
    const double upstream = g.grad_penalty[lane];
    for (int64_t c = 0; c < g.channels; ++c) {
      const double mean = g.mean[lane * g.channels + c];
      const double difference = static_cast<double>(g.var[lane * g.channels + c]) - g.running_var[c];
      // A norm of zero has the subgradient zero, as in PyTorch.
      const double slope = var_norm == 0.0 ? 0.0 : upstream * g.r_var * difference / var_norm * 2.0 / count;
      const double level = mean_norm == 0.0 ? 0.0 : upstream * mean / mean_norm / count;
      of_channel_a[static_cast<size_t>(c)] = static_cast<float>(level - slope * mean);
      of_channel_b[static_cast<size_t>(c)] = static_cast<float>(slope);
    }
    spread(g, r, of_channel_a.data(), a.data() + lane * entries);
    spread(g, r, of_channel_b.data(), b.data() + lane * entries);
  }
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

void stream_results_from(int64_t bytes) { streamed_bytes = bytes; }

int64_t bn_match_mask_bytes(const BnMatchArguments& a) {
  const int64_t image = a.channels * a.plane;
  if (a.channels_last) return a.lanes * up(a.batch * image, 8);
  return a.lanes * a.batch * (a.plane <= kBnMatchSmallPlane ? up(image, 8) : a.channels * up(a.plane, 8));
}

void bn_match_forward(const BnMatchArguments& a, int threads) {
  const Rows rows = rows_of(a);
  const Patches patches = patches_of(a, threads);
  const Parameters parameters(a, rows);
  const int64_t slots = by_rows(a) ? rows.per_lane : by_patches(a) ? patches.groups : a.batch;
  std::vector<double> sum(static_cast<size_t>(a.lanes * slots * a.channels)), square(sum.size());
  const Pass pass{a,       rows,    patches,    parameters.mean.data(), parameters.scale.data(), parameters.bias.data(),
                  nullptr, nullptr, sum.data(), square.data(),          streams(a)};
  run(pass, choose(a).forward, threads);
  finish_statistics(a, sum, square, slots);
}

void bn_match_backward(const BnMatchArguments& g, int threads) {
  const Rows rows = rows_of(g);
  const Parameters parameters(g, rows);
  std::vector<float> a(static_cast<size_t>(g.lanes * parameter_count(g, rows))), b(a.size());
  gradient_coefficients(g, rows, a, b);
  const Pass pass{g,        rows,     patches_of(g, threads), parameters.mean.data(), parameters.scale.data(),
                  parameters.bias.data(), a.data(), b.data(), nullptr, nullptr, streams(g)};
  run(pass, choose(g).backward, threads);
}

}  // namespace infer_fast
