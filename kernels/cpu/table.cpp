// `table`: codes into a table of 2^bits entries of p values (spec/codecs/table.md).
#include "weight.h"

namespace qf {
namespace {

template <int P> QF_INLINE void look_up(const qf_table& w, const Block& b) {
  struct Entry { float value[P]; };
  const int64_t row_bytes = (w.matrix.cols / P * w.bits + 7) / 8, n = (b.c1 - b.c0) / P;
  const Entry* table = (const Entry*)w.table;
  uint8_t bytes[widest + 8];
  uint16_t codes[widest + 8];
  for (int64_t r = b.r0; r < b.r1; r++) {
    const uint8_t* packed = w.codes + r * row_bytes + b.c0 / P * w.bits / 8;
    float* out = b.out + (r - b.r0) * b.ld;
    if (w.bits <= 8) {
      unpack(packed, w.bits, n, bytes);
      for (int64_t i = 0; i < n; i++) memcpy(out + i * P, &table[bytes[i]], sizeof(Entry));
    } else {
      unpack(packed, w.bits, n, codes);
      for (int64_t i = 0; i < n; i++) memcpy(out + i * P, &table[codes[i]], sizeof(Entry));
    }
  }
}

QF_INLINE void add_offsets(const qf_table& w, const Block& b) {
  if (w.offsets.dtype == QF_NONE) return;
  for (int64_t r = b.r0; r < b.r1; r++)
    for (int64_t c = b.c0, end; c < b.c1; c = end) {
      end = block_end(w.grid, c, b.c1);
      const float offset = at(w.offsets, block_of(w.grid, r, c));
      float* out = b.out + (r - b.r0) * b.ld - b.c0;
      for (int64_t i = c; i < end; i++) out[i] += offset;
    }
}

template <int W> QF_INLINE void decode(const Block& b) {
  const qf_table& w = *(const qf_table*)b.matrix;
  if (w.p == 1) look_up<1>(w, b);
  if (w.p == 2) look_up<2>(w, b);
  if (w.p == 4) look_up<4>(w, b);
  if (w.p == 8) look_up<8>(w, b);
  apply_scales(b, w.grid, w.scales);
  add_offsets(w, b);
}

QF_DISPATCH(decode, Block)

}  // namespace

const Decoder decode_table = decode_for;

}  // namespace qf
