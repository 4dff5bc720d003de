// The search for scales of `int` (qformat/codecs/int.py, encode).
#include <new>

#include "qformat.h"
#include "search.h"

namespace qf {
namespace {

// The nearest whole number, ties to even, of numbers below 2^22; larger ones stay beyond every code.
template <class F> QF_INLINE F whole(const F& x) {
  const F far = 0x1.8p23f - F{};
  return (x + far) - far;
}

template <int W> QF_INLINE void attempt(const Trial& t) {
  typedef typename Lanes<W>::f f;
  const f top = *(const float*)t.codec - f{}, nothing = f{};
  const f scale = load<f>(t.scale), zero = load<f>(t.zero), offset = load<f>(t.offset);
  f sum = f{};
  for (int64_t i = 0; i < t.n; i++) {
    const f x = load<f>(t.x + i * W), steps = (x - offset) / scale;
    f code = whole((scale == nothing ? nothing : steps) + zero);
    code = code > nothing ? code : nothing;
    code = code < top ? code : top;
    const f miss = x - ((code - zero) * scale + offset), square = miss * miss;
    sum = sum + square;
    if (t.squares) store(t.squares + i * W, square);
    if (t.codes)
      for (int l = 0; l < W; l++) t.codes[i * W + l] = uint16_t(code[l]);
  }
  if (t.sums) store(t.sums, sum);
}

QF_DISPATCH(attempt, Trial)

}  // namespace
}  // namespace qf

int32_t qf_int_search(const float* x, int64_t n, int64_t blocks, int64_t stride, int64_t candidates, const float* scale,
                      const float* zero, const float* offset, float zero_value, float top, int32_t whole,
                      int32_t threads, uint16_t* codes, int32_t* best) {
  try {
    const int row = qf::variant();
    const qf::Search s{&top, qf::attempt_for[row], qf::variant_lanes(row), x, n, blocks, stride, 1, candidates,
                       scale, zero, offset, zero_value, whole != 0, codes, best, threads};
    return qf::search(s) ? QF_OK : QF_NO_MEMORY;
  } catch (const std::bad_alloc&) {
    return QF_NO_MEMORY;
  }
}
