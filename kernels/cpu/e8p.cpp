// `e8p`: points of the lattice E8, eight values a code (spec/codecs/e8p.md).
#include "weight.h"

namespace qf {
namespace {

constexpr int sign_bits[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // of the byte of signs, for each value

QF_INLINE void signed_point(const qf_e8p& w, const uint8_t* code, float* out) {
  const int8_t* pattern = w.points + 8 * code[1];
  const int odd = __builtin_parity(code[0]), signs = code[0] ^ odd, shift = odd ? -1 : 1;
  for (int k = 0; k < 8; k++) {
    const int quarters = signs >> sign_bits[k] & 1 ? -pattern[k] : pattern[k];
    out[k] = w.numbers[32 + quarters + shift];
  }
}

template <int W> QF_INLINE void decode(const Block& b) {
  const qf_e8p& w = *(const qf_e8p*)b.matrix;
  for (int64_t r = b.r0; r < b.r1; r++) {
    const uint8_t* code = w.codes + (r * w.matrix.cols + b.c0) / 8 * w.bits;
    float* out = b.out + (r - b.r0) * b.ld;
    for (int64_t i = 0; i < (b.c1 - b.c0) / 8; i++, code += w.bits, out += 8) {
      if (w.bits == 2) signed_point(w, code, out);
      else
        for (int k = 0; k < 8; k++) out[k] = w.numbers[32 + w.points[8 * code[0] + k]];
    }
  }
  apply_scales(b, w.grid, w.scales);
}

QF_DISPATCH(decode, Block)

}  // namespace

const Decoder decode_e8p = decode_for;

}  // namespace qf
