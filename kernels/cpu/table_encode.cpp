// The search for scales of `table` and for the nearest entry (qformat/codecs/table.py, encode and nearest).
#include <limits>
#include <new>

#include "qformat.h"
#include "search.h"

namespace qf {
namespace {

struct Table {
  int64_t entries;
  const float* values;  // [entries, p]
  // p = 1: the borders between neighbouring levels and the entry of each level, both ascending by level
  // p > 1: half of each entry's squared length
  const float* borders;
  const int32_t* order;
};

// The level of x: how many borders lie below it.
template <int W, class F> QF_INLINE typename Lanes<W>::i level(const Table& t, const F& x) {
  typedef typename Lanes<W>::i i;
  i below = i{};
  if (t.entries <= 32) {
    for (int64_t b = 0; b < t.entries - 1; b++) below -= (i)((t.borders[b] - F{}) < x);
    return below;
  }
  for (int l = 0; l < W; l++) {
    int64_t from = 0, count = t.entries - 1;
    while (count > 0) {
      const int64_t half = count / 2;
      const bool right = t.borders[from + half] < x[l];
      from = right ? from + half + 1 : from, count = right ? count - half - 1 : half;
    }
    below[l] = int32_t(from);
  }
  return below;
}

// The entry with the largest <x, entry> - |entry|^2 / 2; the first of equals.
template <int W, int P> QF_INLINE typename Lanes<W>::i nearest(const Table& t, const typename Lanes<W>::f* x) {
  typedef typename Lanes<W>::f f;
  typedef typename Lanes<W>::i i;
  f best = -std::numeric_limits<float>::infinity() - f{};
  i found = i{};
  for (int64_t e = 0; e < t.entries; e++) {
    f score = x[0] * t.values[e * P];
    for (int k = 1; k < P; k++) score = score + x[k] * t.values[e * P + k];
    score = score - t.borders[e];
    const i wins = score > best;
    best = wins ? score : best;
    found = wins ? int32_t(e) - i{} : found;
  }
  return found;
}

template <int W, int P> QF_INLINE void attempt_with(const Trial& t) {
  typedef typename Lanes<W>::f f;
  typedef typename Lanes<W>::i i;
  const Table& table = *(const Table*)t.codec;
  const f scale = load<f>(t.scale), nothing = f{};
  f sum = f{};
  for (int64_t j = 0; j < t.n / P; j++) {
    f x[P], ideal[P];
    for (int k = 0; k < P; k++) {
      x[k] = load<f>(t.x + (j * P + k) * W);
      ideal[k] = scale == nothing ? nothing : x[k] / scale;
    }
    i entry;
    if constexpr (P == 1) {
      entry = level<W>(table, ideal[0]);
      for (int l = 0; l < W; l++) entry[l] = table.order[entry[l]];
    } else {
      entry = nearest<W, P>(table, ideal);
    }
    for (int k = 0; k < P; k++) {
      f value;
      for (int l = 0; l < W; l++) value[l] = table.values[int64_t(entry[l]) * P + k];
      const f miss = x[k] - value * scale, square = miss * miss;
      sum = sum + square;
      if (t.squares) store(t.squares + (j * P + k) * W, square);
    }
    if (t.codes)
      for (int l = 0; l < W; l++) t.codes[j * W + l] = uint16_t(entry[l]);
  }
  if (t.sums) store(t.sums, sum);
}

template <int W> QF_INLINE void attempt1(const Trial& t) { attempt_with<W, 1>(t); }
template <int W> QF_INLINE void attempt2(const Trial& t) { attempt_with<W, 2>(t); }
template <int W> QF_INLINE void attempt4(const Trial& t) { attempt_with<W, 4>(t); }
template <int W> QF_INLINE void attempt8(const Trial& t) { attempt_with<W, 8>(t); }
template <int W> QF_INLINE void attempt16(const Trial& t) { attempt_with<W, 16>(t); }

QF_DISPATCH(attempt1, Trial)
QF_DISPATCH(attempt2, Trial)
QF_DISPATCH(attempt4, Trial)
QF_DISPATCH(attempt8, Trial)
QF_DISPATCH(attempt16, Trial)

}  // namespace
}  // namespace qf

int32_t qf_table_search(const float* x, int64_t n, int64_t blocks, int64_t stride, int64_t candidates,
                        const float* scale, int64_t p, int64_t entries, const float* values, const float* borders,
                        const int32_t* order, int32_t whole, int32_t threads, uint16_t* codes, int32_t* best) {
  if (p != 1 && p != 2 && p != 4 && p != 8 && p != 16) return QF_UNSUPPORTED;
  try {
    const qf::Table table{entries, values, borders, order};
    const int row = qf::variant();
    const auto& kernel = p == 1 ? qf::attempt1_for : p == 2 ? qf::attempt2_for : p == 4 ? qf::attempt4_for
                         : p == 8 ? qf::attempt8_for : qf::attempt16_for;
    const qf::Search s{&table, kernel[row], qf::variant_lanes(row), x, n, blocks, stride, p, candidates,
                       scale, nullptr, nullptr, 0.f, whole != 0, codes, best, threads};
    return qf::search(s) ? QF_OK : QF_NO_MEMORY;
  } catch (const std::bad_alloc&) {
    return QF_NO_MEMORY;
  }
}
