// `int`: integers with a scale per block (spec/codecs/int.md).
#include "weight.h"

namespace qf {
namespace {

template <int W> QF_INLINE void decode(const Block& b) {
  const qf_int& w = *(const qf_int*)b.matrix;
  const int64_t row_bytes = (w.matrix.cols * w.bits + 7) / 8;
  const bool has_zeros = w.zeros.dtype != QF_NONE, has_offsets = w.offsets.dtype != QF_NONE;
  uint8_t codes[widest + 8];
  for (int64_t r = b.r0; r < b.r1; r++) {
    unpack(w.codes + r * row_bytes + b.c0 * w.bits / 8, w.bits, b.c1 - b.c0, codes);
    const uint8_t* code = codes - b.c0;
    float* out = b.out + (r - b.r0) * b.ld - b.c0;
    for (int64_t c = b.c0, end; c < b.c1; c = end) {
      end = w.groups ? c + 1 : block_end(w.grid, c, b.c1);
      const int64_t i = w.groups ? r / w.grid.rows * w.grid.across + w.groups[c] : block_of(w.grid, r, c);
      const float scale = at(w.scales, i);
      if (has_offsets) {
        const float offset = at(w.offsets, i);
        for (int64_t k = c; k < end; k++) out[k] = float(code[k]) * scale + offset;
      } else {
        const float zero = has_zeros ? at(w.zeros, i) : w.zero;
        for (int64_t k = c; k < end; k++) out[k] = (float(code[k]) - zero) * scale;
      }
    }
  }
}

QF_DISPATCH(decode, Block)

}  // namespace

const Decoder decode_int = decode_for;

}  // namespace qf
