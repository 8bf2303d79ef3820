// The loops of bn_match over planes and pieces for one instruction set, in the namespace INFER_FAST_TARGET.
// Included by bn_match.cpp alone; see bn_match_kernels.h for what may stand here.
namespace INFER_FAST_TARGET {

#include "bn_match_kernels.h"

template <typename Scalar, Activation kind, bool with_residual>
void forward_planes(const Pass& p, const Scratch& scratch, int64_t begin, int64_t end) {
  const BnMatchArguments& a = p.arguments;
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t c = plane % a.channels, at = plane * a.plane;
    forward_plane<Scalar, kind, with_residual>(
        static_cast<const Scalar*>(a.x) + at, with_residual ? static_cast<const Scalar*>(a.residual) + at : nullptr,
        static_cast<Scalar*>(a.y) + at, a.mask ? a.mask + plane * ((a.plane + 7) / 8) : nullptr, a.plane, p.mean[c],
        p.scale[c], p.bias[c], scratch, p.streams, p.sum + plane, p.square + plane);
  }
}

template <typename Scalar, Activation kind, bool with_residual>
void backward_planes(const Pass& p, const Scratch& scratch, int64_t begin, int64_t end) {
  const BnMatchArguments& a = p.arguments;
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t c = plane % a.channels, at = plane * a.plane;
    const int64_t lane = plane / (a.batch * a.channels);
    backward_plane<Scalar, kind, with_residual>(
        static_cast<const Scalar*>(a.x) + at,
        with_residual && a.residual ? static_cast<const Scalar*>(a.residual) + at : nullptr,
        static_cast<const Scalar*>(a.grad_y) + at, a.mask ? a.mask + plane * ((a.plane + 7) / 8) : nullptr,
        static_cast<Scalar*>(a.grad_x) + at, with_residual ? static_cast<Scalar*>(a.grad_residual) + at : nullptr,
        a.plane, p.mean[c], p.scale[c], p.bias[c], p.a[lane * a.channels + c], p.b[lane * a.channels + c], scratch,
        p.streams);
  }
}

// Some images of a lane, and some of their channels: what a thread takes of a tensor with small planes.
struct Patch {
  int64_t lane, group, first_image, last_image, first_channel, last_channel;
};

inline Patch patch_of(const BnMatchArguments& a, const Patches& t, int64_t index) {
  const int64_t block = index % t.blocks, group = index / t.blocks % t.groups, lane = index / t.blocks / t.groups;
  const int64_t last = (group + 1) * t.images;
  return {lane,
          lane * t.groups + group,
          lane * a.batch + group * t.images,
          lane * a.batch + (last < a.batch ? last : a.batch),
          a.channels * block / t.blocks,
          a.channels * (block + 1) / t.blocks};
}

// Planes from `c` on that are taken together: their results are one stretch of memory, and so are their bits.
inline int64_t planes_together(const BnMatchArguments& a, const Patch& patch, int64_t c) {
  const int64_t fit = a.plane % 8 == 0 ? kPart / a.plane : 1, left = patch.last_channel - c;
  return fit < left ? fit : left;
}

template <typename Scalar, Activation kind, bool with_residual>
void forward_patches(const Pass& p, const Scratch& scratch, int64_t begin, int64_t end) {
  constexpr bool packs = with_residual && (kind == Activation::relu || kind == Activation::relu6);
  const BnMatchArguments& a = p.arguments;
  const int64_t whole = a.channels * a.plane;  // an image
  for (int64_t index = begin; index < end; ++index) {
    const Patch patch = patch_of(a, p.patches, index);
    for (int64_t i = 2 * kFold * patch.first_channel; i < 2 * kFold * patch.last_channel; ++i) scratch.sums[i] = 0.0f;
    for (int64_t image = patch.first_image, images; image < patch.last_image; image += images) {
      images = a.plane < kTogether * kFold && image + kTogether <= patch.last_image ? kTogether : 1;
      for (int64_t first = patch.first_channel; first < patch.last_channel;) {
        const int64_t planes = planes_together(a, patch, first), count = planes * a.plane;
        const int64_t at = image * whole + first * a.plane;
        const Scalar* x = static_cast<const Scalar*>(a.x) + at;
        const Scalar* residual = with_residual ? static_cast<const Scalar*>(a.residual) + at : nullptr;
        Scalar* y = static_cast<Scalar*>(a.y) + at;
        float* out = in_place_or(y, scratch.block, p.streams);
        const Pitch pitch{whole, out == scratch.block ? kPart : whole, kPart};
        for (int64_t k = 0, c = first; k < count; k += a.plane, ++c) {
          const Scalar* added = with_residual ? residual + k : nullptr;
          float* sums = scratch.sums + 2 * kFold * c;
          if (images == 1)
            forward_small_plane<Scalar, kind, with_residual>(x + k, added, out + k, scratch.flags + k, a.plane,
                                                             p.mean[c], p.scale[c], p.bias[c], sums);
          else
            forward_small_planes<Scalar, kind, with_residual>(x + k, added, out + k, scratch.flags + k, pitch, a.plane,
                                                              p.mean[c], p.scale[c], p.bias[c], sums);
        }
        for (int64_t i = 0; i < images; ++i) {
          deliver(out + i * pitch.out, y + i * whole, count, p.streams);
          if (packs && a.mask)
            pack_bits(scratch.flags + i * kPart, a.mask + ((image + i) * a.channels + first) * ((a.plane + 7) / 8),
                      count);
        }
        first += planes;
      }
    }
    for (int64_t c = patch.first_channel; c < patch.last_channel; ++c) {
      const float *sum = scratch.sums + 2 * kFold * c, *square = sum + kFold;
      float s = 0.0f, q = 0.0f;
#pragma omp simd reduction(+ : s, q)
      for (int64_t j = 0; j < kFold; ++j) {
        s += sum[j];
        q += square[j];
      }
      p.sum[patch.group * a.channels + c] = s;
      p.square[patch.group * a.channels + c] = q;
    }
  }
}

template <typename Scalar, Activation kind, bool with_residual>
void backward_patches(const Pass& p, const Scratch& scratch, int64_t begin, int64_t end) {
  constexpr bool packed = with_residual && (kind == Activation::relu || kind == Activation::relu6);
  constexpr bool reads_residual = with_residual && kind == Activation::silu;
  const BnMatchArguments& a = p.arguments;
  for (int64_t index = begin; index < end; ++index) {
    const Patch patch = patch_of(a, p.patches, index);
    const float *level = p.a + patch.lane * a.channels, *slope = p.b + patch.lane * a.channels;
    for (int64_t image = patch.first_image; image < patch.last_image; ++image)
      for (int64_t first = patch.first_channel; first < patch.last_channel;) {
        const int64_t planes = planes_together(a, patch, first), count = planes * a.plane;
        const int64_t at = (image * a.channels + first) * a.plane;
        const Scalar* x = static_cast<const Scalar*>(a.x) + at;
        const Scalar* grad_y = static_cast<const Scalar*>(a.grad_y) + at;
        const Scalar* residual = reads_residual ? static_cast<const Scalar*>(a.residual) + at : nullptr;
        Scalar* grad_x = static_cast<Scalar*>(a.grad_x) + at;
        Scalar* grad_residual = with_residual ? static_cast<Scalar*>(a.grad_residual) + at : nullptr;
        float* out = in_place_or(grad_x, scratch.block, p.streams);
        float* out_residual = with_residual ? in_place_or(grad_residual, scratch.second_block, p.streams) : nullptr;
        if (packed) unpack_bits(a.mask + (image * a.channels + first) * ((a.plane + 7) / 8), scratch.flags, count);
        for (int64_t k = 0, c = first; k < count; k += a.plane, ++c)
          backward_small_plane<Scalar, kind, with_residual>(x + k, reads_residual ? residual + k : nullptr, grad_y + k,
                                                            scratch.flags + k, out + k,
                                                            with_residual ? out_residual + k : nullptr, a.plane,
                                                            p.mean[c], p.scale[c], p.bias[c], level[c], slope[c]);
        deliver(out, grad_x, count, p.streams);
        if (with_residual) deliver(out_residual, grad_residual, count, p.streams);
        first += planes;
      }
  }
}

// Where a piece lies: element offsets from the start of the tensor, rows of `count` elements `pitch` apart.
struct Place {
  int64_t first_row, last_row, block, lane;  // rows of the lane, and which of the blocks side by side
  int64_t parameters;                        // where the block's parameters begin
};

inline Place place_of(const Rows& r, int64_t piece) {
  const int64_t block = piece % r.blocks, down = piece / r.blocks % r.per_lane, lane = piece / r.blocks / r.per_lane;
  const int64_t first = down * r.rows;
  const int64_t last = first + r.rows < r.lane_rows ? first + r.rows : r.lane_rows;
  return {first, last, block, lane, block * r.width};
}

// Elements of the run of rows that begins at `row`: whole rows, but for the last of a lane or a block.
inline int64_t run_elements(const Rows& r, const Place& place, int64_t row, int64_t rows) {
  if (r.blocks > 1) {  // one row at a time; the last block may be narrower
    const int64_t left = r.pitch - place.block * r.width;
    return left < r.width ? left : r.width;
  }
  const int64_t end = (row + rows) * r.width;
  return (end < r.lane_elements ? end : r.lane_elements) - row * r.width;
}

template <typename Scalar, Activation kind, bool with_residual>
void forward_pieces(const Pass& p, const Scratch& scratch, int64_t begin, int64_t end) {
  constexpr bool packs = with_residual && (kind == Activation::relu || kind == Activation::relu6);
  const BnMatchArguments& a = p.arguments;
  const Rows& r = p.rows;
  float *sum = scratch.sums, *square = scratch.sums + r.width;
  for (int64_t piece = begin; piece < end; ++piece) {
    const Place place = place_of(r, piece);
    for (int64_t i = 0; i < 2 * r.width; ++i) sum[i] = 0.0f;
    for (int64_t row = place.first_row; row < place.last_row; row += r.run) {
      const int64_t rows = row + r.run < place.last_row ? r.run : place.last_row - row;
      const int64_t count = run_elements(r, place, row, rows);
      const int64_t at = place.lane * r.lane_elements + row * r.pitch + place.parameters;
      forward_rows<Scalar, kind, with_residual>(
          static_cast<const Scalar*>(a.x) + at, with_residual ? static_cast<const Scalar*>(a.residual) + at : nullptr,
          static_cast<Scalar*>(a.y) + at, scratch.flags, count, r.width, r.chunk, r.together, p.mean + place.parameters,
          p.scale + place.parameters, p.bias + place.parameters, scratch.block, p.streams, sum, square);
      if (packs && a.mask) pack_bits(scratch.flags, a.mask + mask_offset(a, at), count);
    }
    const int64_t slot = (place.lane * r.per_lane + place.first_row / r.rows) * a.channels;
    gather(a, r, place.parameters, sum, p.sum + slot);
    gather(a, r, place.parameters, square, p.square + slot);
  }
}

template <typename Scalar, Activation kind, bool with_residual>
void backward_pieces(const Pass& p, const Scratch& scratch, int64_t begin, int64_t end) {
  constexpr bool packed = with_residual && (kind == Activation::relu || kind == Activation::relu6);
  const BnMatchArguments& a = p.arguments;
  const Rows& r = p.rows;
  for (int64_t piece = begin; piece < end; ++piece) {
    const Place place = place_of(r, piece);
    const float* coefficients_a = p.a + place.lane * r.parameters + place.parameters;
    const float* coefficients_b = p.b + place.lane * r.parameters + place.parameters;
    for (int64_t row = place.first_row; row < place.last_row; row += r.run) {
      const int64_t rows = row + r.run < place.last_row ? r.run : place.last_row - row;
      const int64_t count = run_elements(r, place, row, rows);
      const int64_t at = place.lane * r.lane_elements + row * r.pitch + place.parameters;
      if (packed) unpack_bits(a.mask + mask_offset(a, at), scratch.flags, count);
      backward_rows<Scalar, kind, with_residual>(
          static_cast<const Scalar*>(a.x) + at,
          with_residual && a.residual ? static_cast<const Scalar*>(a.residual) + at : nullptr,
          static_cast<const Scalar*>(a.grad_y) + at, scratch.flags, static_cast<Scalar*>(a.grad_x) + at,
          with_residual ? static_cast<Scalar*>(a.grad_residual) + at : nullptr, count, r.width, r.chunk, r.together,
          p.mean + place.parameters, p.scale + place.parameters, p.bias + place.parameters, coefficients_a,
          coefficients_b, scratch.block, scratch.second_block, p.streams);
    }
  }
}

template <typename Scalar, Activation kind, bool with_residual>
Variant variant_of() {
  return {{forward_planes<Scalar, kind, with_residual>, forward_patches<Scalar, kind, with_residual>,
           forward_pieces<Scalar, kind, with_residual>},
          {backward_planes<Scalar, kind, with_residual>, backward_patches<Scalar, kind, with_residual>,
           backward_pieces<Scalar, kind, with_residual>}};
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
