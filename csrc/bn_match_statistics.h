// The per-channel vectors of bn_match: parameters before a pass, statistics and the penalty after the forward one, its
// gradient's coefficients before the backward one.
#pragma once

#include <vector>

#include "bn_match_cut.h"

namespace infer_fast {

// The parameters, per channel or as the elements of a row.
struct Parameters {
  std::vector<float> mean, scale, bias;

  Parameters(const BnMatchArguments& arguments, const Rows& rows);
};

// mean, var and penalty of every lane, from the sums of d = x - running_mean and d*d of its pieces.
void finish_statistics(const BnMatchArguments& arguments, const std::vector<double>& sum,
                       const std::vector<double>& square, int64_t pieces_per_lane);

// d penalty / d x = a + b * (x - running_mean) for each (lane, channel), times the penalty's own gradient; laid out as
// the parameters are.
void gradient_coefficients(const BnMatchArguments& arguments, const Rows& rows, std::vector<float>& a,
                           std::vector<float>& b);

}  // namespace infer_fast
