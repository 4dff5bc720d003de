// Matrices of no codec: the sum of several, and one that lies there as it is.
#include <memory>

#include "weight.h"

namespace qf {
namespace {

QF_INLINE float rounded(float x, int64_t dtype) {
  if (dtype == QF_FLOAT16) return from_half(to_half(x));
  if (dtype == QF_BFLOAT16) return from_bits(uint32_t(to_bfloat(x)) << 16);
  return x;
}

template <int W> QF_INLINE void sum(const Block& b) {
  const qf_sum& s = *(const qf_sum*)b.matrix;
  const int64_t n = b.c1 - b.c0;
  Block term = b;
  term.matrix = s.terms[0];
  decode(term);
  std::unique_ptr<float[]> next(new float[(b.r1 - b.r0) * n]);
  term.out = next.get(), term.ld = n;
  for (int64_t i = 1; i < s.count; i++) {
    term.matrix = s.terms[i];
    decode(term);
    for (int64_t r = 0; r < b.r1 - b.r0; r++)
      for (int64_t c = 0; c < n; c++) {
        float& out = b.out[r * b.ld + c];
        out = rounded(out + next[r * n + c], s.dtype);
      }
  }
}

template <int W> QF_INLINE void dense(const Block& b) {
  const qf_dense& d = *(const qf_dense*)b.matrix;
  for (int64_t r = b.r0; r < b.r1; r++)
    memcpy(b.out + (r - b.r0) * b.ld, d.data + r * d.matrix.cols + b.c0, sizeof(float) * (b.c1 - b.c0));
}

QF_DISPATCH(sum, Block)
QF_DISPATCH(dense, Block)

}  // namespace

const Decoder decode_sum = sum_for, decode_dense = dense_for;

}  // namespace qf
