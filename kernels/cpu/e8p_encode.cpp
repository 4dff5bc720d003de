// The nearest points of the lattice (qformat/codecs/e8p.py, nearest): equal to the definition's bit for bit, ties too.
#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "pool.h"
#include "qformat.h"

namespace qf {
namespace {

constexpr int entries = 256, width = 8, chunk = 1024;
constexpr int sign_bits[width] = {0, 4, 1, 5, 2, 6, 3, 7};

struct Table {
  const float* values;                         // [entries, width]
  float sizes[entries][width], half[entries];  // half of the squared length
  int odd[entries];                            // whether an odd number of values is negative

  explicit Table(const float* given) : values(given) {
    for (int e = 0; e < entries; e++) {
      half[e] = 0, odd[e] = 0;
      for (int k = 0; k < width; k++) {
        const float value = values[e * width + k];
        sizes[e][k] = std::fabs(value), half[e] += value * value / 2, odd[e] ^= value < 0;
      }
    }
  }
};

struct Nearest {
  const Table* table;
  const float* x;  // [n, width]
  int64_t n;
  uint8_t* codes;  // [n, 1] or [n, 2]
};

// Value k of W vectors, the last one repeated.
template <int W> QF_INLINE void across(const float* x, int64_t n, typename Lanes<W>::f* out) {
  for (int k = 0; k < width; k++)
    for (int l = 0; l < W; l++) out[k][l] = x[std::min<int64_t>(l, n - 1) * width + k];
}

template <int W> QF_INLINE void nearest1(const Nearest& a) {
  typedef typename Lanes<W>::f f;
  typedef typename Lanes<W>::i i;
  for (int64_t v = 0; v < a.n; v += W) {
    f x[width], best = -std::numeric_limits<float>::infinity() - f{};
    i found = i{};
    across<W>(a.x + v * width, a.n - v, x);
    for (int e = 0; e < entries; e++) {
      const float* point = a.table->values + e * width;
      f likeness = x[0] * point[0];
      for (int k = 1; k < width; k++) likeness = likeness + x[k] * point[k];
      likeness = likeness - a.table->half[e];
      const i wins = likeness > best;
      best = wins ? likeness : best;
      found = wins ? e - i{} : found;
    }
    for (int l = 0; l < std::min<int64_t>(W, a.n - v); l++) a.codes[v + l] = uint8_t(found[l]);
  }
}

// The patterns nearest to W vectors, with an even number of their signs turned: those that differ from the vector's, and
// where they are odd in number the one that costs least.
template <int W, class F> QF_INLINE typename Lanes<W>::i patterns(const Table& table, const F* x) {
  typedef typename Lanes<W>::i i;
  F size[width], best = -std::numeric_limits<float>::infinity() - F{};
  i negative = i{}, found = i{};
  for (int k = 0; k < width; k++) {
    size[k] = x[k] < 0 ? -x[k] : x[k];
    negative ^= (i)(x[k] < 0);
  }
  const F two = 2 - F{}, nothing = F{}, turned[2] = {negative ? two : nothing, negative ? nothing : two};
  for (int e = 0; e < entries; e++) {
    F likeness = size[0] * table.sizes[e][0], least = likeness;
    for (int k = 1; k < width; k++) {
      const F product = size[k] * table.sizes[e][k];
      likeness = likeness + product;
      least = product < least ? product : least;
    }
    likeness = (likeness - table.half[e]) - turned[table.odd[e]] * least;
    const i wins = likeness > best;
    best = wins ? likeness : best;
    found = wins ? e - i{} : found;
  }
  return found;
}

// The signs that go with a pattern for the vector x - shift; returns the squared error, added as NumPy adds it.
inline float sign(const Table& table, const float* x, float shift, int pattern, uint8_t* signs) {
  const float* values = table.values + pattern * width;
  float moved[width], squares[width], least = std::numeric_limits<float>::infinity();
  bool negative[width], odd = false;
  int turned = 0;
  for (int k = 0; k < width; k++) {
    moved[k] = x[k] - shift;
    negative[k] = (moved[k] < 0) != (values[k] < 0), odd ^= negative[k];
    const float product = std::fabs(moved[k]) * table.sizes[pattern][k];
    if (product < least) least = product, turned = k;
  }
  negative[turned] ^= odd;
  *signs = 0;
  for (int k = 0; k < width; k++) {
    const float miss = x[k] - ((negative[k] ? -values[k] : values[k]) + shift);
    squares[k] = miss * miss, *signs |= negative[k] << sign_bits[k];
  }
  return ((squares[0] + squares[1]) + (squares[2] + squares[3])) +
         ((squares[4] + squares[5]) + (squares[6] + squares[7]));
}

template <int W> QF_INLINE void nearest2(const Nearest& a) {
  typedef typename Lanes<W>::f f;
  for (int64_t v = 0; v < a.n; v += W) {
    f x[width], above[width], below[width];
    across<W>(a.x + v * width, a.n - v, x);
    for (int k = 0; k < width; k++) above[k] = x[k] - 0.25f, below[k] = x[k] + 0.25f;
    const auto up = patterns<W>(*a.table, above), down = patterns<W>(*a.table, below);
    for (int l = 0; l < std::min<int64_t>(W, a.n - v); l++) {
      const float* one = a.x + (v + l) * width;
      uint8_t signs[2];
      const bool lower = sign(*a.table, one, -0.25f, down[l], signs + 1) < sign(*a.table, one, 0.25f, up[l], signs);
      a.codes[2 * (v + l)] = lower ? signs[1] ^ 1 : signs[0];  // an odd number of ones stands for the other shift
      a.codes[2 * (v + l) + 1] = uint8_t(lower ? down[l] : up[l]);
    }
  }
}

QF_DISPATCH(nearest1, Nearest)
QF_DISPATCH(nearest2, Nearest)

}  // namespace
}  // namespace qf

int32_t qf_e8p_search(const float* x, int64_t n, int64_t bits, const float* table, int32_t threads, uint8_t* codes) {
  if (bits != 1 && bits != 2) return QF_UNSUPPORTED;
  const qf::Table known(table);
  const auto kernel = (bits == 1 ? qf::nearest1_for : qf::nearest2_for)[qf::variant()];
  const bool done = qf::parallel(threads, (n + qf::chunk - 1) / qf::chunk, [&](int64_t i) {
    const int64_t first = i * qf::chunk;
    kernel({&known, x + first * qf::width, std::min<int64_t>(qf::chunk, n - first), codes + first * bits});
  });
  return done ? QF_OK : QF_NO_MEMORY;
}
