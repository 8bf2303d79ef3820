// How bn_match cuts a tensor: what is summed together never depends on the number of threads.
#include "bn_match_cut.h"

#include <algorithm>
#include <atomic>
#include <fstream>
#include <string>

namespace infer_fast {
namespace {

constexpr int64_t kRowPiece = 16384;       // elements of one piece of rows, at least
constexpr int64_t kPieces = 64;            // of a lane, to aim for beyond that
constexpr int64_t kChunk = 128;            // elements of a wide row that are taken together
constexpr int64_t kWidth = 64;             // channels_last rows shorter than this are taken several at a time
constexpr int64_t kBlock = 1024;           // elements of an image of the smallest planes that are taken together
constexpr int64_t kImages = 16;            // images of small planes that are summed together, at most
constexpr int64_t kFoldedOnto = 256;       // elements that add to one of them, at most, before double takes over
constexpr int64_t kUsualCache = 32 << 20;  // bytes of the last cache where the system doesn't tell

// Bytes of the last cache that this processor's cores share, as Linux tells it (glibc's sysconf counts all of a
// socket's).
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

}  // namespace

Patches patches_of(const BnMatchArguments& a, int threads) {
  const int64_t most = std::clamp<int64_t>(kFoldedOnto * kFold / a.plane, 1, kImages);
  const int64_t images = up(up(a.batch, up(a.batch, most)), kTogether) * kTogether;  // much the same in every group
  const int64_t groups = up(a.batch, images), all = a.lanes * groups;
  const int64_t blocks = all % threads == 0 || all >= 4 * threads ? 1 : up(4 * threads, all);
  return {images, groups, std::min(blocks, a.channels)};
}

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

void stream_results_from(int64_t bytes) { streamed_bytes = bytes; }

int64_t bn_match_mask_bytes(const BnMatchArguments& a) {
  const int64_t image = a.channels * a.plane;
  if (a.channels_last) return a.lanes * up(a.batch * image, 8);
  return a.lanes * a.batch * (a.plane <= kBnMatchSmallPlane ? up(image, 8) : a.channels * up(a.plane, 8));
}

}  // namespace infer_fast
