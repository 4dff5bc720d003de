// Products with a whole weight: the rotation is applied to activations, the stored matrix is used as it is.
#include <cmath>
#include <memory>
#include <new>

#include "pool.h"
#include "weight.h"

namespace qf {
namespace {

typedef std::unique_ptr<float[]> Floats;

Floats floats(int64_t n) { return Floats(new float[n]); }

// x times the Sylvester matrix of order n, in place.
template <int W> QF_INLINE void sylvester(float* x, int64_t n) {
  typedef typename Lanes<W>::f f;
  for (int64_t half = 1; half < n; half *= 2)
    for (int64_t i = 0; i < n; i += 2 * half) {
      int64_t j = i;
      for (; j + W <= i + half; j += W) {
        const f a = load<f>(x + j), b = load<f>(x + j + half);
        store(x + j, a + b), store(x + j + half, a - b);
      }
      for (; j < i + half; j++) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b, x[j + half] = a - b;
      }
    }
}

struct Turn {  // U x, or Uᵀ x, for one vector of the side's length
  const qf_side* side;
  bool transpose;
  float* x;
  float* spare;  // [size]
};

// y = M x for M [n, n] and x, y [n, width]; or Mᵀ x.
QF_INLINE void multiply(const float* m, int64_t n, int64_t width, bool transpose, const float* x, float* y) {
  for (int64_t i = 0; i < n; i++) {
    float* row = y + i * width;
    std::fill(row, row + width, 0.f);
    for (int64_t j = 0; j < n; j++) {
      const float factor = transpose ? m[j * n + i] : m[i * n + j];
      for (int64_t k = 0; k < width; k++) row[k] += factor * x[j * width + k];
    }
  }
}

template <int W> QF_INLINE void turn(const Turn& t) {
  const qf_side& s = *t.side;
  const int64_t width = s.size / s.order;
  const float norm = float(1 / std::sqrt(double(s.size)));
  for (float* x = t.x; x < t.x + s.length; x += s.size) {
    if (s.matrix || s.order > 1) {
      memcpy(t.spare, x, sizeof(float) * s.size);
      if (s.matrix)
        multiply(s.matrix, s.size, 1, t.transpose, t.spare, x);
      else
        multiply(s.hadamard, s.order, width, t.transpose, t.spare, x);
    }
    if (s.matrix) continue;
    for (int64_t k = 0; k < s.order; k++) sylvester<W>(x + k * width, width);
    for (int64_t i = 0; i < s.size; i++) x[i] *= norm;
  }
}

QF_DISPATCH(turn, Turn)

void turned(const qf_side& s, bool transpose, float* x, float* spare) {
  if (s.size > 1) turn_for[variant()]({&s, transpose, x, spare});
}

void placed(const int32_t* from, int64_t n, float* x, float* spare) {
  if (!from) return;
  memcpy(spare, x, sizeof(float) * n);
  for (int64_t i = 0; i < n; i++) x[i] = spare[from[i]];
}

void scaled(const qf_side& s, float* x) {
  if (!s.scale) return;
  for (int64_t i = 0; i < s.length; i++) x[i] *= s.scale[i];
}

// D·P·U x and Uᵀ·Pᵀ·D x, in place; spare [length].
void undo(const qf_side& s, float* x, float* spare) {
  turned(s, false, x, spare);
  placed(s.inverse, s.length, x, spare);
  scaled(s, x);
}

void apply(const qf_side& s, float* x, float* spare) {
  scaled(s, x);
  placed(s.perm, s.length, x, spare);
  turned(s, true, x, spare);
}

bool plain(const qf_side& s) { return s.size == 1 && !s.perm && !s.scale; }

// Rows of x [m, from], with zeros behind them or cut, as rows of y [m, to].
void resized(const float* x, int64_t from, int64_t m, float* y, int64_t to) {
  const int64_t n = std::min(from, to);
  for (int64_t i = 0; i < m; i++) {
    memcpy(y + i * to, x + i * from, sizeof(float) * n);
    std::fill(y + i * to + n, y + (i + 1) * to, 0.f);
  }
}

int32_t linear(const qf_weight& w, const float* x, int64_t m, float* y, int32_t threads) {
  const int64_t rows = w.stored->rows, cols = w.stored->cols;
  Floats wide, turned_x, tall, more;
  if (cols != w.cols) {
    wide = floats(m * cols);
    resized(x, w.cols, m, wide.get(), cols);
    x = wide.get();
  }
  const float* turned = x;
  if (!plain(w.in)) {
    turned_x = floats(m * cols);
    memcpy(turned_x.get(), x, sizeof(float) * m * cols);
    const bool ok = parallel(m * cols < 1 << 16 ? 1 : threads, m, [&](int64_t i) {
      apply(w.in, turned_x.get() + i * cols, floats(cols).get());
    });
    if (!ok) return QF_NO_MEMORY;
    turned = turned_x.get();
  }
  if (rows != w.rows) tall = floats(m * rows);
  float* out = rows != w.rows ? tall.get() : y;
  int32_t status = qf_linear(w.stored, turned, m, out, threads);
  if (status == QF_OK && !plain(w.out)) {
    const bool ok = parallel(m * rows < 1 << 16 ? 1 : threads, m, [&](int64_t i) {
      undo(w.out, out + i * rows, floats(rows).get());
    });
    status = ok ? QF_OK : QF_NO_MEMORY;
  }
  if (w.outsides) more = floats(m * rows);
  for (int64_t i = 0; i < w.outsides && status == QF_OK; i++) {
    status = qf_linear(w.outside[i], x, m, more.get(), threads);
    for (int64_t k = 0; k < m * rows; k++) out[k] += more[k];
  }
  if (rows != w.rows) resized(out, rows, m, y, w.rows);
  return status;
}

// A row of P·U·stored, which mixes the rows of its block; scaled by D.
void turned_row(const qf_weight& w, int64_t row, float* out) {
  const qf_side& s = w.out;
  const int64_t cols = w.stored->cols, unit = w.stored->row_unit;
  const int64_t place = s.inverse ? s.inverse[row] : row, first = place / s.size * s.size;
  const int64_t r0 = first / unit * unit, r1 = std::min((first + s.size + unit - 1) / unit * unit, w.stored->rows);
  Floats block = floats((r1 - r0) * cols), factors = floats(s.size), spare = floats(s.size);
  decode({w.stored, r0, r1, 0, cols, block.get(), cols});
  std::fill(factors.get(), factors.get() + s.size, 0.f);
  factors[place - first] = 1;
  qf_side one = s;
  one.length = s.size;
  turned(one, true, factors.get(), spare.get());  // the row of U: Uᵀ times a unit vector
  const float* from = block.get() + (first - r0) * cols;
  for (int64_t c = 0; c < cols; c++) out[c] = factors[0] * from[c];
  for (int64_t j = 1; j < s.size; j++)
    for (int64_t c = 0; c < cols; c++) out[c] += factors[j] * from[j * cols + c];
  if (s.scale)
    for (int64_t c = 0; c < cols; c++) out[c] *= s.scale[row];
}

int32_t embedding(const qf_weight& w, const int64_t* rows, int64_t n, float* out, int32_t threads) {
  const int64_t cols = w.stored->cols;
  const bool ok = parallel(n * cols < 1 << 16 ? 1 : threads, n, [&](int64_t i) {
    Floats row = floats(cols), more = floats(cols);
    turned_row(w, rows[i], row.get());
    undo(w.in, row.get(), more.get());
    for (int64_t k = 0; k < w.outsides; k++) {
      qf_embedding(w.outside[k], rows + i, 1, more.get(), 1);
      for (int64_t c = 0; c < cols; c++) row[c] += more[c];
    }
    resized(row.get(), cols, 1, out + i * w.cols, w.cols);
  });
  return ok ? QF_OK : QF_NO_MEMORY;
}

}  // namespace
}  // namespace qf

int32_t qf_weight_linear(const qf_weight* weight, const float* x, int64_t m, float* y, int32_t threads) {
  try {
    return qf::linear(*weight, x, m, y, threads);
  } catch (const std::bad_alloc&) {
    return QF_NO_MEMORY;
  }
}

int32_t qf_weight_embedding(const qf_weight* weight, const int64_t* rows, int64_t n, float* out, int32_t threads) {
  return qf::embedding(*weight, rows, n, out, threads);
}
