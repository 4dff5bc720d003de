// `trellis`: windows of L bits of a tile's cyclic bit string, looked up in a table of all states
// (spec/codecs/trellis.md).
#include "weight.h"

namespace qf {
namespace {

constexpr int64_t most = 4096;  // elements of a tile

// k: bits of a step where all steps have as many and few enough, else 0.
template <int V>
QF_INLINE void decode_tile(const qf_trellis& w, const uint8_t* codes, const int32_t* place, int k, float* out) {
  const int64_t bytes = w.string_bits / 8, steps = w.matrix.row_unit * w.matrix.col_unit / V;
  const uint32_t mask = (uint32_t(1) << w.L) - 1;
  uint8_t string[most + 8];  // at most 8 bits a weight, then its beginning again
  memcpy(string, codes, size_t(bytes));
  for (int64_t i = 0; i < 8; i++) string[bytes + i] = string[i % bytes];
  const auto put = [&](int64_t u, uint32_t state) __attribute__((always_inline)) {
    for (int v = 0; v < V; v++) out[place[u * V + v]] = w.values[int64_t(state) * V + v];
  };
  if (k)
    for (int64_t u = 0; u < steps; u += 4) {
      const uint64_t x = load<uint64_t>(string + u * k / 8) >> u * k % 8;
      for (int i = 0; i < 4; i++) put(u + i, uint32_t(x >> i * k) & mask);
    }
  else
    for (int64_t u = 0; u < steps; u++) put(u, load<uint32_t>(string + w.starts[u] / 8) >> w.starts[u] % 8 & mask);
}

int uniform(const qf_trellis& w) {
  const int64_t steps = w.matrix.row_unit * w.matrix.col_unit / w.V, k = w.string_bits / steps;
  if (7 + 3 * k + w.L > 64) return 0;
  for (int64_t u = 0; u < steps; u++)
    if (w.starts[u] != u * k) return 0;
  return int(k);
}

template <int W> QF_INLINE void decode(const Block& b) {
  const qf_trellis& w = *(const qf_trellis*)b.matrix;
  const int64_t high = w.matrix.row_unit, wide = w.matrix.col_unit, across = w.matrix.cols / wide;
  const int k = uniform(w);
  int32_t place[most];  // in `out`
  for (int64_t i = 0; i < high * wide; i++) place[i] = int32_t(w.place[i] / wide * b.ld + w.place[i] % wide);
  for (int64_t r = b.r0; r < b.r1; r += high)
    for (int64_t c = b.c0; c < b.c1; c += wide) {
      const uint8_t* codes = w.codes + (r / high * across + c / wide) * (w.string_bits / 8);
      float* out = b.out + (r - b.r0) * b.ld + c - b.c0;
      w.V == 1 ? decode_tile<1>(w, codes, place, k, out) : decode_tile<2>(w, codes, place, k, out);
    }
  apply_scales(b, w.grid, w.scales);
}

QF_DISPATCH(decode, Block)

}  // namespace

const Decoder decode_trellis = decode_for;

}  // namespace qf
