// compose: gather, dequantise, clamp, crop, flip, MixUp and normalise a batch in one pass over its output.
#include "ops.h"

namespace infer_fast {
namespace {

// A shift by more than the image is a shift out of it: the sum of a coordinate and a shift can't overflow.
int64_t clamp(int64_t shift, int64_t size) { return shift < -size ? -size : (shift > size ? size : shift); }

// One row of image `item` in [0,1] pixels, cropped and flipped, into row[0..width).
void read_row(const ComposeArguments& a, int64_t item, int64_t channel, int64_t y, float* row) {
  const int64_t dy = a.shift ? clamp(a.shift[2 * item], a.height) : 0;
  const int64_t dx = a.shift ? clamp(a.shift[2 * item + 1], a.width) : 0;
  const int64_t source_y = y + dy;
  for (int64_t x = 0; x < a.width; ++x) row[x] = 0.0f;
  if (source_y < 0 || source_y >= a.height) return;

  const int64_t plane = a.height * a.width;
  const uint8_t* base = a.base + (a.base_index[item] * 3 + channel) * plane + source_y * a.width;
  const int64_t begin = dx < 0 ? -dx : 0;
  const int64_t end = dx > 0 ? a.width - dx : a.width;
  for (int64_t x = begin; x < end; ++x) row[x] = static_cast<float>(base[x + dx]) / 255.0f;

  const int64_t k = a.compensators ? a.compensator_index[item] : -1;
  if (k >= 0) {
    const uint8_t* values = a.compensators + (k * 3 + channel) * plane + source_y * a.width;
    const float scale = a.scale[k * 3 + channel], offset = a.offset[k * 3 + channel];
    for (int64_t x = begin; x < end; ++x) {
      const float pixel = row[x] + (static_cast<float>(values[x + dx]) * scale + offset);
      row[x] = pixel < 0.0f ? 0.0f : (pixel > 1.0f ? 1.0f : pixel);
    }
  }
  if (a.flip && a.flip[item])
    for (int64_t x = 0; x < a.width / 2; ++x) {
      const float left = row[x];
      row[x] = row[a.width - 1 - x];
      row[a.width - 1 - x] = left;
    }
}

inline void store(float value, float* out) { *out = value; }

// To nearest, ties to even. (A composed pixel is never NaN.)
inline void store(float value, bfloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <typename Scalar>
void compose_images(const ComposeArguments& a, int64_t begin, int64_t end) {
  std::vector<float> own(static_cast<size_t>(a.width)), other(static_cast<size_t>(a.width));
  for (int64_t item = begin; item < end; ++item)
    for (int64_t channel = 0; channel < 3; ++channel) {
      const float mean = a.mean[static_cast<size_t>(channel)], deviation = a.std[static_cast<size_t>(channel)];
      for (int64_t y = 0; y < a.height; ++y) {
        read_row(a, item, channel, y, own.data());
        if (a.lam) {
          read_row(a, a.partner[item], channel, y, other.data());
          const float weight = a.lam[item];
          for (int64_t x = 0; x < a.width; ++x) own[x] = weight * own[x] + (1.0f - weight) * other[x];
        }
        Scalar* out = static_cast<Scalar*>(a.out) + ((item * 3 + channel) * a.height + y) * a.width;
        for (int64_t x = 0; x < a.width; ++x) store((own[x] - mean) / deviation, out + x);
      }
    }
}

}  // namespace

void compose(const ComposeArguments& a, int threads) {
  parallel_ranges(a.batch, threads, 16, [&a](int64_t, int64_t begin, int64_t end) {
    if (a.out_is_bfloat16)
      compose_images<bfloat16>(a, begin, end);
    else
      compose_images<float>(a, begin, end);
  });
}

}  // namespace infer_fast
