// bn_match on the CPU: one pass forward (normalise, residual, activation, statistics), one pass backward.
//
// Work is split into pieces that don't depend on the number of threads, and their sums are added in a fixed order, so
// the result is the same for any number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"

namespace infer_fast {
namespace {

constexpr int64_t kPlanePiece = 4096;  // elements summed in float32 before double takes over (contiguous)
constexpr int64_t kRowPiece = 16384;   // elements of one channels_last piece, about
constexpr int64_t kPeriod = 64;        // channels_last rows shorter than this are taken several at a time
constexpr int64_t kRows = 8;           // periods of a channels_last piece whose flags are packed together
constexpr int64_t kLeastPerThread = 16384;  // elements worth another thread

// What one pass works with: the shape, the per-channel parameters, and where everything lies.
struct Pass {
  const BnMatchArguments& arguments;
  const float *mean, *scale, *bias;  // per channel, repeated up to `period` for channels_last
  const float *a, *b;                // backward: per (lane, channel), repeated alike
  int64_t period;                    // entries of one lane's parameters
  double *sum, *square;              // forward: per piece and channel
};

// One thread's own room: 2 * period sums, and the flags of kRows periods.
struct Scratch {
  float* sums;
  uint8_t* flags;
};

// Does the planes or pieces begin..end.
using Work = void (*)(const Pass&, const Scratch&, int64_t begin, int64_t end);

struct Variant {
  Work forward_planes, forward_pieces, backward_planes, backward_pieces;
};

int64_t bytes_of_bits(int64_t count) { return (count + 7) / 8; }

// channels_last: rows (pixels) of one piece, a multiple of 8 so that a piece's bits start at a byte, and of the rows
// that share one period.
int64_t rows_per_piece(int64_t channels, int64_t period) {
  const int64_t together = 8 * (period / channels);
  return std::max<int64_t>(1, kRowPiece / channels / together) * together;
}

int64_t pieces_per_image(const BnMatchArguments& a, int64_t period) {
  const int64_t rows = rows_per_piece(a.channels, period);
  return (a.plane + rows - 1) / rows;
}

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

template <typename Scalar>
Variant choose(Activation kind, bool with_residual) {
#ifdef INFER_FAST_X86
  static const int level = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                   __builtin_cpu_supports("avx512vl")
                               ? 2
                               : (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0);
  if (level == 2) return avx512::variant<Scalar>(kind, with_residual);
  if (level == 1) return avx2::variant<Scalar>(kind, with_residual);
#endif
  return generic::variant<Scalar>(kind, with_residual);
}

Variant choose(const BnMatchArguments& a) {
  const bool with_residual = a.residual != nullptr || a.grad_residual != nullptr;
  return a.is_bfloat16 ? choose<bfloat16>(a.activation, with_residual) : choose<float>(a.activation, with_residual);
}

// The parameters of every channel, written `copies` times over.
struct Parameters {
  std::vector<float> mean, scale, bias;

  Parameters(const BnMatchArguments& a, int64_t copies) {
    const int64_t count = a.channels * copies;
    mean.resize(static_cast<size_t>(count));
    scale.resize(static_cast<size_t>(count));
    bias.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = i % a.channels;
      const size_t at = static_cast<size_t>(i);
      mean[at] = a.running_mean[c];
      const double root = std::sqrt(static_cast<double>(a.running_var[c]) + a.eps);
      scale[at] = static_cast<float>((a.weight ? static_cast<double>(a.weight[c]) : 1.0) / root);
      bias[at] = a.bias ? a.bias[c] : 0.0f;
    }
  }
};

int64_t copies_of_rows(const BnMatchArguments& a) {
  return a.channels_last && a.channels < kPeriod ? std::max<int64_t>(1, kPeriod / a.channels) : 1;
}

// Pieces whose sums are kept apart: for a contiguous tensor each plane is one, for channels_last some rows.
int64_t piece_count(const BnMatchArguments& a, int64_t period) {
  return a.channels_last ? a.lanes * a.batch * pieces_per_image(a, period) : a.lanes * a.batch;
}

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
void gradient_coefficients(const BnMatchArguments& arguments, int64_t copies, std::vector<float>& a,
                           std::vector<float>& b) {
  const BnMatchArguments& g = arguments;
  const double count = static_cast<double>(g.batch) * static_cast<double>(g.plane);
  const int64_t period = g.channels * copies;
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
    for (int64_t i = 0; i < period; ++i) {
      const int64_t c = i % g.channels;
      const double mean = g.mean[lane * g.channels + c];
      const double difference = static_cast<double>(g.var[lane * g.channels + c]) - g.running_var[c];
      // A norm of zero has the subgradient zero, as in PyTorch.
      const double slope = var_norm == 0.0 ? 0.0 : upstream * g.r_var * difference / var_norm * 2.0 / count;
      const double level = mean_norm == 0.0 ? 0.0 : upstream * mean / mean_norm / count;
      a[static_cast<size_t>(lane * period + i)] = static_cast<float>(level - slope * mean);
      b[static_cast<size_t>(lane * period + i)] = static_cast<float>(slope);
    }
  }
}

void run(const BnMatchArguments& a, const Pass& pass, Work planes, Work pieces, int threads) {
  std::vector<float> sums(static_cast<size_t>(2 * pass.period * threads));
  std::vector<uint8_t> flags(static_cast<size_t>((pass.period * kRows + 8) * threads));
  const Work work = a.channels_last ? pieces : planes;
  const int64_t count = a.channels_last ? piece_count(a, pass.period) : a.lanes * a.batch * a.channels;
  const int64_t elements = std::max<int64_t>(1, a.lanes * a.batch * a.channels * a.plane / count);
  parallel_ranges(count, threads, kLeastPerThread / elements, [&](int64_t part, int64_t begin, int64_t end) {
    const Scratch scratch{sums.data() + part * 2 * pass.period, flags.data() + part * (pass.period * kRows + 8)};
    work(pass, scratch, begin, end);
  });
}

}  // namespace

int64_t bn_match_mask_bytes(int64_t images, int64_t channels, int64_t plane, bool channels_last) {
  return channels_last ? images * bytes_of_bits(channels * plane) : images * channels * bytes_of_bits(plane);
}

void bn_match_forward(const BnMatchArguments& a, int threads) {
  const int64_t copies = copies_of_rows(a), period = a.channels * copies, pieces = piece_count(a, period);
  const Parameters parameters(a, copies);
  std::vector<double> sum(static_cast<size_t>(pieces * a.channels)), square(sum.size());
  const Pass pass{a,       parameters.mean.data(), parameters.scale.data(), parameters.bias.data(),
                  nullptr, nullptr,                period,                  sum.data(),
                  square.data()};
  const Variant variant = choose(a);
  run(a, pass, variant.forward_planes, variant.forward_pieces, threads);
  finish_statistics(a, sum, square, pieces / a.lanes);
}

void bn_match_backward(const BnMatchArguments& g, int threads) {
  const int64_t copies = copies_of_rows(g), period = g.channels * copies;
  const Parameters parameters(g, copies);
  std::vector<float> a(static_cast<size_t>(g.lanes * period)), b(a.size());
  gradient_coefficients(g, copies, a, b);
  const Pass pass{g,        parameters.mean.data(), parameters.scale.data(), parameters.bias.data(),
                  a.data(), b.data(),               period,                  nullptr,
                  nullptr};
  const Variant variant = choose(g);
  run(g, pass, variant.backward_planes, variant.backward_pieces, threads);
}

}  // namespace infer_fast
