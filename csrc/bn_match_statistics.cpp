// Work of one number per channel, in double and on one thread: see the formulas in infer_fast.ops.bn_match.
#include "bn_match_statistics.h"

#include <algorithm>
#include <cmath>

namespace infer_fast {
namespace {

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

}  // namespace

Parameters::Parameters(const BnMatchArguments& a, const Rows& r) {
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

}  // namespace infer_fast
