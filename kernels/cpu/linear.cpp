// What runs on a packed matrix, written once for all codecs: strips of rows are decoded into a scratch that stays in
// the cache and used from there. Strips are shared out among threads.
#include <memory>
#include <new>

#include "pool.h"
#include "weight.h"

// Sums of products may be fused here: they are compared with a float32 matmul, not bit for bit.
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

namespace qf {
namespace {

const Decoder decoders[] = {decode_int,   decode_table, decode_trellis, decode_additive,  // by codec
                            decode_float, decode_e8p,   decode_sum,     decode_dense};

constexpr int64_t scratch = 1 << 15;   // floats: 128 KiB, a part of the second-level cache
constexpr int64_t deepest = 1 << 12;   // columns of a strip: those of the widest tile
constexpr int64_t worth = 1 << 16;     // multiplications or decoded weights that are worth another thread

int threads_for(int64_t work, int threads) {
  const int64_t most = std::max<int64_t>(1, work / worth);
  return threads > 0 ? int(std::min<int64_t>(threads, most)) : most == 1 ? 1 : 0;
}

// y[i, r] (+)= sum over k < depth of x[i, k] w[r, k]. Every sum is made in the same order, whatever m and n are.
struct Dots {
  const float* x;
  int64_t m, ldx;
  const float* w;
  int64_t n, ldw, depth;
  float* y;
  int64_t ldy;
  bool add;
};

template <int W> QF_INLINE float total(const typename Lanes<W>::f& v) {
  typedef Lanes<4>::f four;
  const float* p = (const float*)&v;
  four sum = load<four>(p);
  for (int l = 4; l < W; l += 4) sum += load<four>(p + l);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <int W, int M, int N> QF_INLINE void dots_tile(const Dots& d, int64_t i, int64_t r) {
  typedef typename Lanes<W>::f f;
  const float* x = d.x + i * d.ldx;
  const float* w = d.w + r * d.ldw;
  f sum[M][N];
  for (auto& row : sum)
    for (f& one : row) one = f{};
  int64_t k = 0;
  for (; k + W <= d.depth; k += W) {
    f wk[N];
    for (int n = 0; n < N; n++) wk[n] = load<f>(w + n * d.ldw + k);
    for (int m = 0; m < M; m++) {
      const f xk = load<f>(x + m * d.ldx + k);
      for (int n = 0; n < N; n++) sum[m][n] += xk * wk[n];
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      float tail = 0;
      for (int64_t t = k; t < d.depth; t++) tail += x[m * d.ldx + t] * w[n * d.ldw + t];
      float& y = d.y[(i + m) * d.ldy + r + n];
      const float all = total<W>(sum[m][n]) + tail;
      y = d.add ? y + all : all;
    }
}

template <int W> QF_INLINE void dots(const Dots& d) {
  constexpr int M = 6;
  float near[M * deepest];  // rows of x brought together: a power of two apart they would share a few sets of the cache
  int64_t i = 0;
  for (; i + M <= d.m; i += M) {
    for (int m = 0; m < M; m++) memcpy(near + m * d.depth, d.x + (i + m) * d.ldx, sizeof(float) * d.depth);
    const Dots here{near - i * d.depth, d.m, d.depth, d.w, d.n, d.ldw, d.depth, d.y, d.ldy, d.add};
    int64_t r = 0;
    for (; r + 2 <= d.n; r += 2) dots_tile<W, M, 2>(here, i, r);
    for (; r < d.n; r++) dots_tile<W, M, 1>(here, i, r);
  }
  for (; i < d.m; i++) {
    int64_t r = 0;
    for (; r + 8 <= d.n; r += 8) dots_tile<W, 1, 8>(d, i, r);
    for (; r < d.n; r++) dots_tile<W, 1, 1>(d, i, r);
  }
}

QF_DISPATCH(dots, Dots)

}  // namespace

void decode(const Block& b) {
  const int64_t step = std::max(widest, b.matrix->col_unit);
  for (int64_t c = b.c0; c < b.c1; c += step)
    decoders[b.matrix->codec][variant()]({b.matrix, b.r0, b.r1, c, std::min(c + step, b.c1), b.out + c - b.c0, b.ld});
}

}  // namespace qf

using namespace qf;

int32_t qf_decode(const qf_matrix* matrix, int64_t r0, int64_t r1, float* out, int32_t threads) {
  const int64_t cols = matrix->cols, strip = std::max<int64_t>(matrix->row_unit, 16);
  const bool ok = parallel(threads_for((r1 - r0) * cols, threads), (r1 - r0 + strip - 1) / strip, [&](int64_t i) {
    const int64_t r = r0 + i * strip;
    decode({matrix, r, std::min(r + strip, r1), 0, cols, out + (r - r0) * cols, cols});
  });
  return ok ? QF_OK : QF_NO_MEMORY;
}

int32_t qf_embedding(const qf_matrix* matrix, const int64_t* rows, int64_t n, float* out, int32_t threads) {
  const int64_t cols = matrix->cols, unit = matrix->row_unit;
  const bool ok = parallel(threads_for(n * unit * cols, threads), n, [&](int64_t i) {
    if (unit == 1) return decode({matrix, rows[i], rows[i] + 1, 0, cols, out + i * cols, cols});
    std::unique_ptr<float[]> tiles(new float[unit * cols]);
    const int64_t first = rows[i] / unit * unit;
    decode({matrix, first, first + unit, 0, cols, tiles.get(), cols});
    memcpy(out + i * cols, tiles.get() + (rows[i] - first) * cols, sizeof(float) * cols);
  });
  return ok ? QF_OK : QF_NO_MEMORY;
}

int32_t qf_linear(const qf_matrix* matrix, const float* x, int64_t m, float* y, int32_t threads) {
  const int64_t rows = matrix->rows, cols = matrix->cols;
  const int64_t strip = std::max<int64_t>(matrix->row_unit, m > 8 ? 64 : 16);
  const int64_t fits = std::min<int64_t>(512, std::max<int64_t>(64, scratch / strip));
  const int64_t depth = std::max(matrix->col_unit, fits);
  const bool ok = parallel(threads_for(m * rows * cols, threads), (rows + strip - 1) / strip, [&](int64_t i) {
    std::unique_ptr<float[]> w(new float[strip * depth]);
    const int64_t r = i * strip, n = std::min(strip, rows - r);
    for (int64_t c = 0; c < cols; c += depth) {
      const int64_t part = std::min(depth, cols - c);
      decode({matrix, r, r + n, c, c + part, w.get(), depth});
      dots_for[variant()]({x + c, m, cols, w.get(), n, depth, part, y + r, rows, c > 0});
    }
  });
  return ok ? QF_OK : QF_NO_MEMORY;
}
