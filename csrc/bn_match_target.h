// The loops of bn_match over planes and pieces for one instruction set, in the namespace INFER_FAST_TARGET.
// Included by bn_match.cpp alone; see bn_match_kernels.h for what may stand here.
namespace INFER_FAST_TARGET {

#include "bn_match_kernels.h"

template <typename Scalar, Activation kind, bool with_residual>
void forward_planes(const Pass& p, const Scratch&, int64_t begin, int64_t end) {
  const BnMatchArguments& a = p.arguments;
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t c = plane % a.channels, at = plane * a.plane;
    double sum = 0.0, square = 0.0;
    for (int64_t first = 0; first < a.plane; first += kPlanePiece) {
      const int64_t count = first + kPlanePiece < a.plane ? kPlanePiece : a.plane - first;
      float s, q;
      forward_plane<Scalar, kind, with_residual>(
          static_cast<const Scalar*>(a.x) + at + first,
          with_residual ? static_cast<const Scalar*>(a.residual) + at + first : nullptr,
          static_cast<Scalar*>(a.y) + at + first,
          a.mask ? a.mask + plane * ((a.plane + 7) / 8) + first / 8 : nullptr, count, p.mean[c], p.scale[c], p.bias[c],
          &s, &q);
      sum += s;
      square += q;
    }
    p.sum[plane] = sum;
    p.square[plane] = square;
  }
}

template <typename Scalar, Activation kind, bool with_residual>
void backward_planes(const Pass& p, const Scratch&, int64_t begin, int64_t end) {
  const BnMatchArguments& a = p.arguments;
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t c = plane % a.channels, at = plane * a.plane;
    const int64_t lane = plane / (a.batch * a.channels);
    backward_plane<Scalar, kind, with_residual>(
        static_cast<const Scalar*>(a.x) + at,
        with_residual && a.residual ? static_cast<const Scalar*>(a.residual) + at : nullptr,
        static_cast<const Scalar*>(a.grad_y) + at, a.mask ? a.mask + plane * ((a.plane + 7) / 8) : nullptr,
        static_cast<Scalar*>(a.grad_x) + at, with_residual ? static_cast<Scalar*>(a.grad_residual) + at : nullptr,
        a.plane, p.mean[c], p.scale[c], p.bias[c], p.a[lane * p.period + c], p.b[lane * p.period + c]);
  }
}

// A piece is cut into runs of whole periods, so that act' flags of one run fit in a small buffer.
template <typename Scalar, Activation kind, bool with_residual>
void forward_pieces(const Pass& p, const Scratch& scratch, int64_t begin, int64_t end) {
  constexpr bool packs = with_residual && (kind == Activation::relu || kind == Activation::relu6);
  const BnMatchArguments& a = p.arguments;
  const int64_t rows = rows_per_piece(a.channels, p.period), each = pieces_per_image(a, p.period);
  const int64_t image_elements = a.plane * a.channels, mask_pitch = (image_elements + 7) / 8;
  const int64_t run = p.period * kRows;
  float *sum = scratch.sums, *square = scratch.sums + p.period;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t image = piece / each, first = (piece % each) * rows * a.channels;
    const int64_t last = first + rows * a.channels < image_elements ? first + rows * a.channels : image_elements;
    const int64_t at = image * image_elements;
    for (int64_t i = 0; i < 2 * p.period; ++i) sum[i] = 0.0f;
    for (int64_t e = first; e < last; e += run) {
      const int64_t count = e + run < last ? run : last - e;
      forward_rows<Scalar, kind, with_residual>(
          static_cast<const Scalar*>(a.x) + at + e,
          with_residual ? static_cast<const Scalar*>(a.residual) + at + e : nullptr, static_cast<Scalar*>(a.y) + at + e,
          scratch.flags, count, p.period, p.mean, p.scale, p.bias, sum, square);
      if (packs && a.mask) pack_bits(scratch.flags, a.mask + image * mask_pitch + e / 8, count);
    }
    double *piece_sum = p.sum + piece * a.channels, *piece_square = p.square + piece * a.channels;
    for (int64_t i = 0; i < p.period; ++i) {
      piece_sum[i % a.channels] += sum[i];
      piece_square[i % a.channels] += square[i];
    }
  }
}

template <typename Scalar, Activation kind, bool with_residual>
void backward_pieces(const Pass& p, const Scratch& scratch, int64_t begin, int64_t end) {
  constexpr bool packed = with_residual && (kind == Activation::relu || kind == Activation::relu6);
  const BnMatchArguments& a = p.arguments;
  const int64_t rows = rows_per_piece(a.channels, p.period), each = pieces_per_image(a, p.period);
  const int64_t image_elements = a.plane * a.channels, mask_pitch = (image_elements + 7) / 8;
  const int64_t run = p.period * kRows;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t image = piece / each, first = (piece % each) * rows * a.channels;
    const int64_t last = first + rows * a.channels < image_elements ? first + rows * a.channels : image_elements;
    const int64_t at = image * image_elements, lane = image / a.batch;
    for (int64_t e = first; e < last; e += run) {
      const int64_t count = e + run < last ? run : last - e;
      if (packed) unpack_bits(a.mask + image * mask_pitch + e / 8, scratch.flags, count);
      backward_rows<Scalar, kind, with_residual>(
          static_cast<const Scalar*>(a.x) + at + e,
          with_residual && a.residual ? static_cast<const Scalar*>(a.residual) + at + e : nullptr,
          static_cast<const Scalar*>(a.grad_y) + at + e, scratch.flags, static_cast<Scalar*>(a.grad_x) + at + e,
          with_residual ? static_cast<Scalar*>(a.grad_residual) + at + e : nullptr, count, p.period, p.mean, p.scale,
          p.bias, p.a + lane * p.period, p.b + lane * p.period);
    }
  }
}

template <typename Scalar, Activation kind, bool with_residual>
Variant variant_of() {
  return {forward_planes<Scalar, kind, with_residual>, forward_pieces<Scalar, kind, with_residual>,
          backward_planes<Scalar, kind, with_residual>, backward_pieces<Scalar, kind, with_residual>};
}

template <typename Scalar, bool with_residual>
Variant variant_with(Activation kind) {
  switch (kind) {
    case Activation::relu:
      return variant_of<Scalar, Activation::relu, with_residual>();
    case Activation::relu6:
      return variant_of<Scalar, Activation::relu6, with_residual>();
    case Activation::silu:
      return variant_of<Scalar, Activation::silu, with_residual>();
    default:
      return variant_of<Scalar, Activation::none, with_residual>();
  }
}

template <typename Scalar>
Variant variant(Activation kind, bool with_residual) {
  return with_residual ? variant_with<Scalar, true>(kind) : variant_with<Scalar, false>(kind);
}

}  // namespace INFER_FAST_TARGET
