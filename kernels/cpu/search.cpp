#include "search.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "pool.h"

namespace qf {
namespace {

constexpr int most_lanes = 16;

// One value for each lane of blocks [b, b + count), the last repeated.
struct Settings {
  float scale[most_lanes], zero[most_lanes], offset[most_lanes];

  Settings(const Search& s, int64_t candidate, int64_t b, int64_t count) {
    for (int l = 0; l < most_lanes; l++) set(l, s, candidate, b + std::min<int64_t>(l, count - 1));
  }
  void set(int l, const Search& s, int64_t candidate, int64_t b) {
    const int64_t i = candidate * s.blocks + b;
    scale[l] = s.scale[i], zero[l] = s.zero ? s.zero[i] : s.zero_value, offset[l] = s.offset ? s.offset[i] : 0.f;
  }
};

// Lanes are blocks.
void several(const Search& s, int64_t b) {
  const int W = s.lanes;
  const int64_t count = std::min<int64_t>(W, s.blocks - b);
  std::vector<float> x(s.n * W);
  for (int64_t i = 0; i < s.n; i++)
    for (int l = 0; l < W; l++) x[i * W + l] = s.x[i * s.stride + b + std::min<int64_t>(l, count - 1)];
  float least[most_lanes], sums[most_lanes];
  int64_t best[most_lanes] = {};
  for (int64_t c = 0; c < s.candidates; c++) {
    const Settings set(s, c, b, count);
    s.kernel({s.codec, x.data(), s.n, set.scale, set.zero, set.offset, sums, nullptr, nullptr});
    for (int l = 0; l < W; l++)
      if (c == 0 || sums[l] < least[l]) least[l] = sums[l], best[l] = c;
  }
  Settings set(s, 0, b, count);
  for (int l = 0; l < W; l++) set.set(l, s, best[l], b + std::min<int64_t>(l, count - 1));
  std::vector<uint16_t> codes(s.n / s.p * W);
  s.kernel({s.codec, x.data(), s.n, set.scale, set.zero, set.offset, nullptr, nullptr, codes.data()});
  for (int64_t l = 0; l < count; l++) {
    s.best[b + l] = int32_t(best[l]);
    for (int64_t j = 0; j < s.n / s.p; j++) s.codes[j * s.stride + b + l] = codes[j * W + l];
  }
}

// NumPy's sum of n contiguous float32.
float pairwise(const float* a, int64_t n) {
  if (n < 8) {
    float sum = 0;  // NumPy starts from -0, which makes no difference to squares
    for (int64_t i = 0; i < n; i++) sum += a[i];
    return sum;
  }
  if (n > 128) {
    const int64_t half = n / 2 - n / 2 % 8;
    return pairwise(a, half) + pairwise(a + half, n - half);
  }
  float r[8];
  for (int l = 0; l < 8; l++) r[l] = a[l];
  int64_t i = 8;
  for (; i < n - n % 8; i += 8)
    for (int l = 0; l < 8; l++) r[l] += a[i + l];
  float sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
  for (; i < n; i++) sum += a[i];
  return sum;
}

// Lanes are vectors of the only block.
bool one(const Search& s) {
  const int W = s.lanes;
  const int64_t chunk = 256 * W, vectors = s.n / s.p, chunks = (vectors + chunk - 1) / chunk;
  std::vector<float> squares(s.n);
  const auto pass = [&](int64_t c, float* error, uint16_t* found) {
    const Settings set(s, c, 0, 1);
    return parallel(s.threads, chunks, [&, error, found](int64_t i) {
      const int64_t first = i * chunk, here = std::min(chunk, vectors - first), rows = (here + W - 1) / W;
      std::vector<float> x(rows * s.p * W), square(error ? x.size() : 0);
      std::vector<uint16_t> codes(found ? rows * W : 0);
      for (int64_t v = 0; v < here; v++)
        for (int64_t k = 0; k < s.p; k++) x[(v / W * s.p + k) * W + v % W] = s.x[((first + v) * s.p + k) * s.stride];
      s.kernel({s.codec, x.data(), rows * s.p, set.scale, set.zero, set.offset, nullptr,
                           error ? square.data() : nullptr, found ? codes.data() : nullptr});
      for (int64_t v = 0; v < here && error; v++)
        for (int64_t k = 0; k < s.p; k++) error[(first + v) * s.p + k] = square[(v / W * s.p + k) * W + v % W];
      for (int64_t v = 0; v < here && found; v++) found[(first + v) * s.stride] = codes[v];
    });
  };
  float least = 0;
  for (int64_t c = 0; c < s.candidates; c++) {
    if (!pass(c, squares.data(), nullptr)) return false;
    const float error = pairwise(squares.data(), s.n);
    if (c == 0 || error < least) least = error, *s.best = int32_t(c);
  }
  return pass(*s.best, nullptr, s.codes);
}

}  // namespace

bool search(const Search& s) {
  if (s.whole) return one(s);
  return parallel(s.threads, (s.blocks + s.lanes - 1) / s.lanes, [&](int64_t i) { several(s, i * s.lanes); });
}

}  // namespace qf
