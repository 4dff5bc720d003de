// `float`: numbers of 4 to 8 bits with a scale per block (spec/codecs/float.md).
#include "weight.h"

namespace qf {
namespace {

template <int P> QF_INLINE void look_up(const qf_float& w, const uint8_t* packed, int64_t n, float* out) {
  struct Entry { float value[P]; };
  const Entry* table = (const Entry*)w.table;
  uint8_t codes[widest + 8];
  unpack(packed, w.bits, n, codes);
  for (int64_t i = 0; i < n; i++) memcpy(out + i * P, &table[codes[i]], sizeof(Entry));
}

QF_INLINE float scale_at(const qf_float& w, int64_t i) {
  return w.scale_numbers ? w.scale_numbers[((const uint8_t*)w.scales.data)[i]] : at(w.scales, i);
}

template <int W> QF_INLINE void decode(const Block& b) {
  const qf_float& w = *(const qf_float*)b.matrix;
  const int64_t row_bytes = (w.matrix.cols / w.p * w.bits + 7) / 8, n = (b.c1 - b.c0) / w.p;
  for (int64_t r = b.r0; r < b.r1; r++) {
    const uint8_t* packed = w.codes + r * row_bytes + b.c0 / w.p * w.bits / 8;
    float* out = b.out + (r - b.r0) * b.ld;
    if (w.p == 1) look_up<1>(w, packed, n, out);
    if (w.p == 2) look_up<2>(w, packed, n, out);
    if (w.scales.dtype == QF_NONE) continue;
    out -= b.c0;
    for (int64_t c = b.c0, end; c < b.c1; c = end) {
      end = block_end(w.grid, c, b.c1);
      const float scale = scale_at(w, block_of(w.grid, r, c));
      for (int64_t i = c; i < end; i++) out[i] = out[i] * scale * w.last;
    }
  }
}

QF_DISPATCH(decode, Block)

}  // namespace

const Decoder decode_float = decode_for;

}  // namespace qf
