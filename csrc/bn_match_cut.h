// How bn_match cuts a tensor into the pieces that threads take, and where each piece's values and bits lie.
#pragma once

#include "ops.h"

namespace infer_fast {

constexpr int64_t kFold = 16;     // partial sums of a small plane
constexpr int64_t kPart = 512;    // elements of a plane summed in float32 before double takes over
constexpr int64_t kTogether = 4;  // rows, or stretches of kFold elements, that are taken together

// Contiguous planes up to this many elements are taken many at a time, and their images' mask bits lie together.
constexpr int64_t kBnMatchSmallPlane = 32;

// How a tensor is read row by row, the images of one lane being one group. channels_last: a row is some pixels, and
// kTogether go together, so that their parameters are touched once; but where memory bounds the work (float32 results
// that go past the caches), processors read one row after the other faster, and then rows are longer.
// Contiguous with small planes: a row is one image, cut into blocks of whole planes. Parameters lie as the elements of
// one row do, so that a row is one loop without a branch.
struct Rows {
  int64_t width;          // elements of a row (of a block of it)
  int64_t pitch;          // elements from one row to the next
  int64_t blocks;         // blocks side by side in a row (1: rows are whole and lie side by side)
  int64_t rows;           // rows of one piece
  int64_t chunk;          // elements of a row that are taken together with those of the rows below
  bool together;          // whether they are
  int64_t run;            // rows that lie side by side and are taken in one call
  int64_t lane_rows;      // rows of a lane (the last may be short, channels_last)
  int64_t lane_elements;  // elements of a lane
  int64_t per_lane;       // pieces of a lane, one below another
  int64_t parameters;     // entries of the parameters: those of all blocks
};

// How a contiguous tensor of small planes is cut. The images of a group are summed together, so the groups depend on
// the shape alone; blocks of channels only spread the work over the threads.
struct Patches {
  int64_t images;  // of a group (the last may be smaller)
  int64_t groups;  // of a lane's images
  int64_t blocks;  // of the channels
};

inline int64_t up(int64_t count, int64_t each) { return (count + each - 1) / each; }

// Contiguous planes of a few elements that don't fill registers are taken as rows, too.
inline bool by_rows(const BnMatchArguments& a) {
  return a.channels_last || (a.plane <= kBnMatchSmallPlane && a.plane % kFold != 0);
}

inline bool by_patches(const BnMatchArguments& a) { return !by_rows(a) && a.plane < kPart; }

// The byte of the mask where the bits of the element `at` begin. The bits of a lane (channels_last) or of an image
// begin at a byte of their own.
inline int64_t mask_offset(const BnMatchArguments& a, int64_t at) {
  const int64_t each = a.channels * a.plane * (a.channels_last ? a.batch : 1);
  return at / each * ((each + 7) / 8) + at % each / 8;
}

// Entries of one parameter: per channel, or as the elements of a row.
inline int64_t parameter_count(const BnMatchArguments& a, const Rows& r) {
  return by_rows(a) ? r.parameters : a.channels;
}

Rows rows_of(const BnMatchArguments& arguments);

Patches patches_of(const BnMatchArguments& arguments, int threads);

// Whether results are written past the caches.
bool streams(const BnMatchArguments& arguments);

}  // namespace infer_fast
