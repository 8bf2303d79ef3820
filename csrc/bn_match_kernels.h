// The inner loops of bn_match. bn_match.cpp includes this file once per instruction set, each time inside a namespace
// of its own and under that set's #pragma GCC target; it must define nothing outside, and use no lambda and no
// standard template, lest code for a newer processor be shared with an older one.
//
// A segment is a run of elements that lie side by side. In a contiguous tensor it is one plane, with one value of each
// parameter; in a channels_last tensor it is some rows, with parameters that repeat every `period` elements.

#include "bn_match_memory.h"

// exp(x) within 2 units in the last place (infinite above 88.4), by 2^n * exp(r) with |r| <= ln(2)/2 and a degree-6
// polynomial for exp(r) (the method and the constants of S. Moshier's Cephes library).
inline float exponential(float x) {
  const float limited = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);  // NaN passes unchanged
  const float magic = 12582912.0f;                                      // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = limited * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  const float r = (limited - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t whole;  // unsigned: for NaN it holds anything, and shifting that must be harmless
  std::memcpy(&whole, &shifted, sizeof whole);
  const uint32_t exponent = (whole + (127u - 0x4b400000u)) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  return x > 88.37f ? __builtin_inff() : p * power;
}

template <Activation kind>
inline float activate(float z) {
  if (kind == Activation::relu) return z < 0.0f ? 0.0f : z;  // NaN stays
  if (kind == Activation::relu6) return z < 0.0f ? 0.0f : (z > 6.0f ? 6.0f : z);
  if (kind == Activation::silu) return z / (1.0f + exponential(-z));
  return z;
}

// act'(z), at the corners and for NaN as PyTorch has it: 0 where z is exactly 0 or 6, 1 for NaN.
template <Activation kind>
inline float derivative(float z) {
  if (kind == Activation::relu) return z <= 0.0f ? 0.0f : 1.0f;
  if (kind == Activation::relu6) return z <= 0.0f || z >= 6.0f ? 0.0f : 1.0f;
  if (kind == Activation::silu) {
    const float s = 1.0f / (1.0f + exponential(-z));
    return s * (1.0f + z * (1.0f - s));
  }
  return 1.0f;
}

// One plane forward: y, and the sums of d = x - mean and d*d. With a residual, mask gets the bits of act'.
template <typename Scalar, Activation kind, bool with_residual>
inline void forward_plane(const Scalar* x, const Scalar* residual, Scalar* y, uint8_t* mask, int64_t count, float mean,
                          float scale, float bias, const Scratch& scratch, bool streams, double* sum, double* square) {
  constexpr bool packs = with_residual && (kind == Activation::relu || kind == Activation::relu6);
  double total = 0.0, total_square = 0.0;
  for (int64_t begin = 0; begin < count; begin += kPart) {
    const int64_t left = count - begin < kPart ? count - begin : kPart;
    float* out = in_place_or(y + begin, scratch.block, streams);
    uint8_t* flags = scratch.flags;
    if (streams && begin + left < count) fetch(x + begin + left, left);
    float s = 0.0f, q = 0.0f;
#pragma omp simd reduction(+ : s, q)
    for (int64_t i = 0; i < left; ++i) {
      const float d = load(x + begin + i) - mean;
      s += d;
      q += d * d;
      float z = d * scale + bias;
      if (with_residual) z += load(residual + begin + i);
      if (packs) flags[i] = derivative<kind>(z) != 0.0f;
      out[i] = activate<kind>(z);
    }
    deliver(out, y + begin, left, streams);
    if (packs && mask) pack_bits(flags, mask + begin / 8, left);
    total += s;
    total_square += q;
  }
  *sum = total;
  *square = total_square;
}

// One plane backward: grad_x = act'(z) * grad_y * scale + a + b * d, and with a residual its gradient act'(z) * grad_y.
template <typename Scalar, Activation kind, bool with_residual>
inline void backward_plane(const Scalar* x, const Scalar* residual, const Scalar* grad_y, const uint8_t* mask,
                           Scalar* grad_x, Scalar* grad_residual, int64_t count, float mean, float scale, float bias,
                           float a, float b, const Scratch& scratch, bool streams) {
  constexpr bool packed = with_residual && (kind == Activation::relu || kind == Activation::relu6);
  for (int64_t begin = 0; begin < count; begin += kPart) {
    const int64_t left = count - begin < kPart ? count - begin : kPart;
    float* out = in_place_or(grad_x + begin, scratch.block, streams);
    float* out_residual = with_residual ? in_place_or(grad_residual + begin, scratch.second_block, streams) : nullptr;
    uint8_t* flags = scratch.flags;
    if (packed) unpack_bits(mask + begin / 8, flags, left);
#pragma omp simd
    for (int64_t i = 0; i < left; ++i) {
      const float d = load(x + begin + i) - mean;
      float g = load(grad_y + begin + i);
      if (packed) {
        g = flags[i] ? g : 0.0f;
      } else if (kind != Activation::none) {
        float z = d * scale + bias;
        if (with_residual) z += load(residual + begin + i);
        g *= derivative<kind>(z);
      }
      if (with_residual) out_residual[i] = g;
      out[i] = g * scale + (a + b * d);
    }
    deliver(out, grad_x + begin, left, streams);
    if (with_residual) deliver(out_residual, grad_residual + begin, left, streams);
  }
}

// One element forward, for parameters that the caller holds.
template <typename Scalar, Activation kind, bool with_residual>
inline void forward_element(const Scalar* x, const Scalar* residual, float* out, uint8_t* flags, int64_t i, float mean,
                            float scale, float bias, float* sum, float* square) {
  constexpr bool packs = with_residual && (kind == Activation::relu || kind == Activation::relu6);
  const float d = load(x + i) - mean;
  *sum += d;
  *square += d * d;
  float z = d * scale + bias;
  if (with_residual) z += load(residual + i);
  if (packs) flags[i] = derivative<kind>(z) != 0.0f;
  out[i] = activate<kind>(z);
}

template <typename Scalar, Activation kind, bool with_residual>
inline void backward_element(const Scalar* x, const Scalar* residual, const Scalar* grad_y, const uint8_t* flags,
                             float* out, float* out_residual, int64_t i, float mean, float scale, float bias, float a,
                             float b) {
  constexpr bool packed = with_residual && (kind == Activation::relu || kind == Activation::relu6);
  const float d = load(x + i) - mean;
  float g = load(grad_y + i);
  if (packed) {
    g = flags[i] ? g : 0.0f;
  } else if (kind != Activation::none) {
    float z = d * scale + bias;
    if (with_residual) z += load(residual + i);
    g *= derivative<kind>(z);
  }
  if (with_residual) out_residual[i] = g;
  out[i] = g * scale + (a + b * d);
}

// Elements from one of the stretches that are taken together to the next.
struct Pitch {
  int64_t in, out, flags;
};

// kTogether stretches of kFold elements forward: element j of each adds to the sums of j, so that no plane pays for
// adding up across a register, and the sums are touched once for kTogether elements. `sums` holds those of d, then
// those of d*d.
template <typename Scalar, Activation kind, bool with_residual>
INFER_FAST_INSIDE inline void forward_stretches(const Scalar* x, const Scalar* residual, float* out, uint8_t* flags,
                                                const Pitch& pitch, float mean, float scale, float bias, float* sums) {
#pragma omp simd
  for (int64_t j = 0; j < kFold; ++j) {
    float s = 0.0f, q = 0.0f;
    for (int64_t k = 0; k < kTogether; ++k)
      forward_element<Scalar, kind, with_residual>(x + k * pitch.in, with_residual ? residual + k * pitch.in : nullptr,
                                                   out + k * pitch.out, flags + k * pitch.flags, j, mean, scale, bias,
                                                   &s, &q);
    sums[j] += s;
    sums[kFold + j] += q;
  }
}

// A small plane forward.
template <typename Scalar, Activation kind, bool with_residual>
INFER_FAST_INSIDE inline void forward_small_plane(const Scalar* x, const Scalar* residual, float* out, uint8_t* flags,
                                                  int64_t count, float mean, float scale, float bias, float* sums) {
  int64_t i = 0;
  for (; i + kTogether * kFold <= count; i += kTogether * kFold)
    forward_stretches<Scalar, kind, with_residual>(x + i, with_residual ? residual + i : nullptr, out + i, flags + i,
                                                   {kFold, kFold, kFold}, mean, scale, bias, sums);
  for (; i + kFold <= count; i += kFold) {
#pragma omp simd
    for (int64_t j = 0; j < kFold; ++j)
      forward_element<Scalar, kind, with_residual>(x, residual, out, flags, i + j, mean, scale, bias, sums + j,
                                                   sums + kFold + j);
  }
  for (int64_t j = 0; i + j < count; ++j)
    forward_element<Scalar, kind, with_residual>(x, residual, out, flags, i + j, mean, scale, bias, sums + j,
                                                 sums + kFold + j);
}

// The same small plane of kTogether images.
template <typename Scalar, Activation kind, bool with_residual>
INFER_FAST_INSIDE inline void forward_small_planes(const Scalar* x, const Scalar* residual, float* out, uint8_t* flags,
                                                   const Pitch& pitch, int64_t count, float mean, float scale,
                                                   float bias, float* sums) {
  int64_t i = 0;
  for (; i + kFold <= count; i += kFold)
    forward_stretches<Scalar, kind, with_residual>(x + i, with_residual ? residual + i : nullptr, out + i, flags + i,
                                                   pitch, mean, scale, bias, sums);
  for (int64_t j = 0; i + j < count; ++j)
    for (int64_t k = 0; k < kTogether; ++k)
      forward_element<Scalar, kind, with_residual>(x + k * pitch.in, with_residual ? residual + k * pitch.in : nullptr,
                                                   out + k * pitch.out, flags + k * pitch.flags, i + j, mean, scale,
                                                   bias, sums + j, sums + kFold + j);
}

template <typename Scalar, Activation kind, bool with_residual>
INFER_FAST_INSIDE inline void backward_small_plane(const Scalar* x, const Scalar* residual, const Scalar* grad_y,
                                                   const uint8_t* flags, float* out, float* out_residual, int64_t count,
                                                   float mean, float scale, float bias, float a, float b) {
  int64_t i = 0;
  for (; i + kFold <= count; i += kFold) {
#pragma omp simd
    for (int64_t j = 0; j < kFold; ++j)
      backward_element<Scalar, kind, with_residual>(x, residual, grad_y, flags, out, out_residual, i + j, mean, scale,
                                                    bias, a, b);
  }
  for (; i < count; ++i)
    backward_element<Scalar, kind, with_residual>(x, residual, grad_y, flags, out, out_residual, i, mean, scale, bias,
                                                  a, b);
}

// Rows that lie side by side, forward; parameters and sums have `width` entries, and count may end within a row.
// kTogether rows are taken at once, so that parameters and sums are touched once for all of them, or (together: false)
// one after the other. Of wide rows `chunk` or kPart elements are taken at a time: reading and writing past the caches
// take short turns.
template <typename Scalar, Activation kind, bool with_residual>
inline void forward_rows(const Scalar* x, const Scalar* residual, Scalar* y, uint8_t* flags, int64_t count,
                         int64_t width, int64_t chunk, bool together, const float* mean, const float* scale,
                         const float* bias, float* block, bool streams, float* sum, float* square) {
  int64_t begin = 0;
  for (; together && begin + kTogether * width <= count; begin += kTogether * width)
    for (int64_t first = 0; first < width; first += chunk) {
      const int64_t columns = first + chunk < width ? chunk : width - first, at = begin + first;
      float* out = in_place_or(y + at, block, streams);
      const int64_t pitch = out == block ? chunk : width;
      if (streams) fetch_rows(x + at, columns, width);
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) {
        const float m = mean[first + c], k = scale[first + c], o = bias[first + c];
        float s = 0.0f, q = 0.0f;
        for (int64_t row = 0; row < kTogether; ++row) {
          const int64_t side = at + row * width;
          forward_element<Scalar, kind, with_residual>(x + side, with_residual ? residual + side : nullptr,
                                                       out + row * pitch, flags + side, c, m, k, o, &s, &q);
        }
        sum[first + c] += s;
        square[first + c] += q;
      }
      deliver_rows(out, y + at, columns, pitch, width, streams);
    }
  for (; begin < count; begin += width) {
    const int64_t left = begin + width < count ? width : count - begin;
    for (int64_t first = 0; first < left; first += kPart) {
      const int64_t columns = first + kPart < left ? kPart : left - first, at = begin + first;
      float* out = in_place_or(y + at, block, streams);
      if (streams) fetch(x + at + kPart, columns);
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c)
        forward_element<Scalar, kind, with_residual>(x + at, with_residual ? residual + at : nullptr, out, flags + at,
                                                     c, mean[first + c], scale[first + c], bias[first + c],
                                                     sum + first + c, square + first + c);
      deliver(out, y + at, columns, streams);
    }
  }
}

template <typename Scalar, Activation kind, bool with_residual>
inline void backward_rows(const Scalar* x, const Scalar* residual, const Scalar* grad_y, const uint8_t* flags,
                          Scalar* grad_x, Scalar* grad_residual, int64_t count, int64_t width, int64_t chunk,
                          bool together, const float* mean, const float* scale, const float* bias, const float* a,
                          const float* b, float* block, float* second_block, bool streams) {
  constexpr bool reads_residual = with_residual && kind == Activation::silu;
  int64_t begin = 0;
  for (; together && begin + kTogether * width <= count; begin += kTogether * width)
    for (int64_t first = 0; first < width; first += chunk) {
      const int64_t columns = first + chunk < width ? chunk : width - first, at = begin + first;
      float* out = in_place_or(grad_x + at, block, streams);
      float* out_residual = with_residual ? in_place_or(grad_residual + at, second_block, streams) : nullptr;
      const int64_t pitch = out == block ? chunk : width;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) {
        const float m = mean[first + c], k = scale[first + c], o = bias[first + c];
        const float level = a[first + c], slope = b[first + c];
        for (int64_t row = 0; row < kTogether; ++row) {
          const int64_t side = at + row * width;
          backward_element<Scalar, kind, with_residual>(
              x + side, reads_residual ? residual + side : nullptr, grad_y + side, flags + side, out + row * pitch,
              with_residual ? out_residual + row * pitch : nullptr, c, m, k, o, level, slope);
        }
      }
      deliver_rows(out, grad_x + at, columns, pitch, width, streams);
      if (with_residual) deliver_rows(out_residual, grad_residual + at, columns, pitch, width, streams);
    }
  for (; begin < count; begin += width) {
    const int64_t left = begin + width < count ? width : count - begin;
    for (int64_t first = 0; first < left; first += kPart) {
      const int64_t columns = first + kPart < left ? kPart : left - first, at = begin + first;
      float* out = in_place_or(grad_x + at, block, streams);
      float* out_residual = with_residual ? in_place_or(grad_residual + at, second_block, streams) : nullptr;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c)
        backward_element<Scalar, kind, with_residual>(x + at, reads_residual ? residual + at : nullptr, grad_y + at,
                                                      flags + at, out, out_residual, c, mean[first + c],
                                                      scale[first + c], bias[first + c], a[first + c], b[first + c]);
      deliver(out, grad_x + at, columns, streams);
      if (with_residual) deliver(out_residual, grad_residual + at, columns, streams);
    }
  }
}
