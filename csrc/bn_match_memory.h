// How the inner loops of bn_match read and write: numbers, results past the caches, bits. Included as
// bn_match_kernels.h is, and under its rules.

inline float load(const float* p) { return *p; }

inline float load(const bfloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To nearest, ties to even; NaN stays NaN. Never inlined: inside larger functions GCC leaves the loop scalar.
INFER_FAST_APART inline void narrow(const float* values, bfloat16* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    const int32_t quiet = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : 0;
    const uint32_t rounded = static_cast<uint32_t>(bits) + 0x7fffu + ((static_cast<uint32_t>(bits) >> 16) & 1u);
    out[i].bits = static_cast<uint16_t>((rounded | static_cast<uint32_t>(quiet)) >> 16);
  }
}

// Writes past the caches, where memory allows it: a line that nobody reads soon need not be fetched to be overwritten.
inline void stream(const void* from, void* to, int64_t bytes) {
#ifdef __SSE2__
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0 && bytes % 16 == 0) {
    const float* source = static_cast<const float*>(from);
    float* target = static_cast<float*>(to);
    for (int64_t i = 0; i < bytes / 4; i += 4) _mm_stream_ps(target + i, _mm_loadu_ps(source + i));
    return;
  }
#endif
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

// Asks for the `count` values that come next: beside writes past the caches, processors guess too late what is read.
template <typename Scalar>
inline void fetch(const Scalar* next, int64_t count) {
#ifdef __SSE2__
  const char* from = reinterpret_cast<const char*>(next);
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(Scalar)); i += 64) _mm_prefetch(from + i, _MM_HINT_T0);
#endif
}

// Where a block of results is computed as float32: in place, or (bfloat16, or past the caches) in `block`, from which
// deliver() takes them.
inline float* in_place_or(float* out, float* block, bool streams) { return streams ? block : out; }
inline float* in_place_or(bfloat16*, float* block, bool) { return block; }

inline void deliver(const float* block, float* out, int64_t count, bool streams) {
  if (streams) stream(block, out, count * 4);
}

inline void deliver(const float* block, bfloat16* out, int64_t count, bool streams) {
  if (!streams) return narrow(block, out, count);
  for (int64_t i = 0; i < count; i += kPart) {
    const int64_t left = count - i < kPart ? count - i : kPart;
    bfloat16 part[kPart];
    narrow(block + i, part, left);
    stream(part, out + i, left * 2);
  }
}

// The same of kTogether rows, `pitch` apart in the block and `width` apart in memory.
template <typename Scalar>
inline void deliver_rows(const float* block, Scalar* out, int64_t columns, int64_t pitch, int64_t width, bool streams) {
  if (columns == width && pitch == width) return deliver(block, out, kTogether * width, streams);
  for (int64_t row = 0; row < kTogether; ++row) deliver(block + row * pitch, out + row * width, columns, streams);
}

// Asks for the values that come next in each of kTogether rows: so many rows on that memory has the time to answer.
template <typename Scalar>
inline void fetch_rows(const Scalar* x, int64_t columns, int64_t width) {
  const int64_t ahead = up(kPart, kTogether * width) * kTogether * width;
  for (int64_t row = 0; row < kTogether; ++row) fetch(x + ahead + row * width, columns);
}

// 8 flags of 0 or 1 to a byte and back; `flags` has room for count rounded up to 8.
inline void pack_bits(const uint8_t* flags, uint8_t* mask, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, flags + i, sizeof bytes);
    mask[i / 8] = static_cast<uint8_t>((bytes * 0x0102040810204080ull) >> 56);
  }
}

inline void unpack_bits(const uint8_t* mask, uint8_t* flags, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    const uint64_t spread = (mask[i / 8] * 0x0101010101010101ull) & 0x8040201008040201ull;
    const uint64_t bytes = ((spread + 0x7f7f7f7f7f7f7f7full) >> 7) & 0x0101010101010101ull;
    std::memcpy(flags + i, &bytes, sizeof bytes);
  }
}
