// The encoder of `trellis`: a Viterbi search over bitshift trellises (spec/codecs/trellis.md).
//
// State s of step u is the L bits of the string that start at p(u); k(u) = V * bits[u] of them are the step's own, the
// other L - k(u), called the overlap, are the low bits of the next state. One step of the search goes from the cost of
// every overlap before the step to the cost of every overlap after it:
//
//     cost(s)  = before[s & (2^(L - k(u-1)) - 1)] + (sum over v of (x[v] - values[s][v])^2)
//     after[q] = min over j of cost(q << k(u) | j),        back[q] = the first j that attains it
//
// in float32, operation by operation as written. Two vector forms, equal in every bit:
//   across   lanes are the top bits of q. The table is laid out once as W interleaved stretches; a step reads it from
//            end to end, and since `before` is indexed without the top bits, one element (for k = 1, 2: a chunk of 2 to
//            8) serves all lanes. Costs are kept in the order in which the next step wants those chunks.
//   along    lanes are consecutive j, for trellises with few overlaps. Natural order everywhere.
//
// Measured: see bench/native_encode.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <new>
#include <vector>

#include "dispatch.h"
#include "pool.h"
#include "qformat.h"

namespace qf {
namespace {

constexpr float far = std::numeric_limits<float>::infinity();

constexpr int log2i(int w) { return w <= 1 ? 0 : 1 + log2i(w / 2); }

struct Step {
  const float* x;       // [V]
  const float* values;  // planes of `plane` floats, one for each of the V values
  const float* before;
  float* after;
  void* back;  // uint8 in `across`, uint16 in `along`
  int64_t plane;
  int L, V, in, out;  // k(u-1) and k(u)
};

// Where `across` keeps things. An overlap q lies in lane q / rows of row q % rows.
struct Across {
  int lane_bits, row_bits, k;  // of the step that wrote it
  int row(int q) const { return q & ((1 << row_bits) - 1); }
  int lane(int q) const { return q >> row_bits; }
  // Costs: the lanes of a row are turned so that those which differ in bits that the next step keeps lie together.
  int cost(int q) const {
    const int turn = k < lane_bits ? k : 0, place = lane(q) >> turn | lane(q) << (lane_bits - turn);
    return row(q) << lane_bits | (place & ((1 << lane_bits) - 1));
  }
  // Winners: byte b of an int32 lane belongs to row 4 i + b.
  int back(int q) const { return (row(q) >> 2 << lane_bits | lane(q)) << 2 | (row(q) & 3); }
};

// N consecutive floats, repeated over all W lanes.
template <int W, int N> QF_INLINE typename Lanes<W>::f repeat(const float* p) {
  typedef typename Lanes<W>::f f;
  typedef int64_t l __attribute__((vector_size(4 * W)));
  if constexpr (N == 1) return (f)(load<int32_t>(p) + typename Lanes<W>::i{});
  if constexpr (N == 2) return (f)(load<int64_t>(p) + l{});
  if constexpr (N >= 4) {  // may read up to W - N floats more
    const f v = load<f>(p);
#if defined(__clang__)
    if constexpr (W == 16 && N == 8)
      return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    if constexpr (W == 16) return __builtin_shufflevector(v, v, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    if constexpr (W == 8) return __builtin_shufflevector(v, v, 0, 1, 2, 3, 0, 1, 2, 3);
#else
    typename Lanes<W>::i lane;
    for (int i = 0; i < W; i++) lane[i] = i % N;
    return __builtin_shuffle(v, lane);
#endif
  }
}

// Squared differences of x and the V values of W states.
template <int V, class F> QF_INLINE F distance(const F* x, const float* value, int64_t plane) {
  F sum = x[0] - load<F>(value);
  sum = sum * sum;
  if constexpr (V == 2) {
    const F d = x[1] - load<F>(value + plane);
    sum = sum + d * d;
  }
  return sum;
}

// IN: k(u-1), or log2 W if that is less. OUT: k(u), or 0: known at run time alone.
template <int W, int V, int IN, int OUT> QF_INLINE void across_step(const Step& a) {
  typedef typename Lanes<W>::f f;
  typedef typename Lanes<W>::i i;
  constexpr int bits = log2i(W), U = 4;
  const int out = OUT ? OUT : a.out, outs = 1 << out, rows = 1 << (a.L - bits - out);
  const int row_mask = (1 << (a.L - a.in - bits)) - 1;
  i from;
  for (int l = 0; l < W; l++) from[l] = (l << out & (W - 1)) | (out < bits ? l >> (bits - out) : 0);
  f x[V];
  for (int v = 0; v < V; v++) x[v] = a.x[v] - f{};

  for (int r = 0; r < rows; r += U) {
    f best[U];
    i who[U];
    const float *value[U], *cost[U];
    for (int u = 0; u < U; u++) {
      const int s = (r + u) << out;
      const int chunk = IN < bits ? s >> (a.L - bits - IN) : (s >> (a.L - bits - a.in)) & (W - 1);
      value[u] = a.values + int64_t(s) * W;
      cost[u] = a.before + int64_t(s & row_mask) * W + chunk * (W >> IN);
      best[u] = far - f{};
      who[u] = i{};
    }
#pragma GCC unroll 4
    for (int j = 0; j < outs; j++) {
      const i tag = j - i{};
      for (int u = 0; u < U; u++) {
        const int64_t at = int64_t(j) * W;
        const f c = repeat<W, (W >> IN)>(cost[u] + at) + distance<V>(x, value[u] + at, a.plane);
        const i wins = c < best[u];
        best[u] = wins ? c : best[u];
        who[u] = wins ? tag : who[u];
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      if (out < bits) best[u] = permute<W>(best[u], from);
      store(a.after + int64_t(r + u) * W, best[u]);
    }
    store((uint8_t*)a.back + int64_t(r) * W, i(who[0] | who[1] << 8 | who[2] << 16 | who[3] << 24));
  }
}

template <int W, int V> QF_INLINE void along_step(const Step& a) {
  typedef typename Lanes<W>::f f;
  typedef typename Lanes<W>::i i;
  const int outs = 1 << a.out, stride = std::max(outs, W), overlaps = 1 << (a.L - a.out);
  const int mask = (1 << (a.L - a.in)) - 1;
  i lane;
  for (int l = 0; l < W; l++) lane[l] = l;
  f x[V];
  for (int v = 0; v < V; v++) x[v] = a.x[v] - f{};

  for (int q = 0; q < overlaps; q++) {
    const float* value = a.values + int64_t(q) * stride;
    const float* cost = a.before + ((q << a.out) & mask);
    f best = far - f{};
    i who = i{};
    for (int j = 0; j < outs; j += W) {
      const f c = load<f>(cost + j) + distance<V>(x, value + j, a.plane);
      const i wins = c < best;
      best = wins ? c : best;
      who = wins ? lane + j : who;
    }
    float least = best[0];
    int32_t winner = who[0];
    for (int l = 1; l < W; l++)
      if (best[l] < least || (best[l] == least && who[l] < winner)) least = best[l], winner = who[l];
    a.after[q] = least;
    ((uint16_t*)a.back)[q] = uint16_t(winner);
  }
}

template <int W, int V> QF_INLINE void across_any(const Step& a) {
  constexpr int bits = log2i(W);
  if (a.in == 1) return across_step<W, V, 1, 0>(a);
  if (a.in == 2) return a.out == 2 ? across_step<W, V, 2, 2>(a) : across_step<W, V, 2, 0>(a);
  if (a.in == 3) return across_step<W, V, std::min(3, bits), 0>(a);
  return across_step<W, V, bits, 0>(a);
}

template <int W> QF_INLINE void across(const Step& a) { a.V == 1 ? across_any<W, 1>(a) : across_any<W, 2>(a); }
template <int W> QF_INLINE void along(const Step& a) { a.V == 1 ? along_step<W, 1>(a) : along_step<W, 2>(a); }

QF_DISPATCH(across, Step)
QF_DISPATCH(along, Step)

struct Trellis {
  int L, V, T;         // T: steps
  std::vector<int> k;  // [T], bits of a step
  int row;             // of the dispatch table
  int lanes;
  bool wide;                                 // `across`
  std::map<int, std::vector<float>> tables;  // by stride(k)

  int into(int u) const { return k[(u + T - 1) % T]; }
  int stride(int k) const { return wide ? 0 : std::max(1 << k, lanes); }

  // Where a table keeps state s.
  int64_t at(int s, int k) const {
    if (wide) return int64_t(s % ((1 << L) / lanes)) * lanes + s / ((1 << L) / lanes);
    return int64_t(s >> k) * stride(k) + (s & ((1 << k) - 1));
  }
};

Trellis arrange(const float* values, int L, int V, int64_t steps, const int32_t* bits, int nbits) {
  const int row = variant();
  Trellis t{L, V, int(steps), std::vector<int>(steps), row, variant_lanes(row), true, {}};
  const int lane_bits = log2i(t.lanes), S = 1 << L;
  for (int u = 0; u < t.T; u++) t.k[u] = V * bits[u % nbits];
  for (int u = 0; u < t.T; u++)
    t.wide = t.wide && t.k[u] <= 8 && t.into(u) + t.k[u] + lane_bits <= L && t.k[u] + lane_bits + 2 <= L;
  for (int k : t.k) {
    std::vector<float>& table = t.tables[t.stride(k)];
    if (!table.empty()) continue;
    const int64_t plane = t.wide ? S : int64_t(S >> k) * t.stride(k);
    table.assign(plane * V, far);
    for (int s = 0; s < S; s++)
      for (int v = 0; v < V; v++) table[v * plane + t.at(s, k)] = values[int64_t(s) * V + v];
  }
  return t;
}

class Viterbi {
 public:
  explicit Viterbi(const Trellis& trellis) : t_(trellis) {
    const int least = *std::min_element(t_.k.begin(), t_.k.end()), most = *std::max_element(t_.k.begin(), t_.k.end());
    const int64_t overlaps = int64_t(1) << (t_.L - least), size = std::max(overlaps, int64_t(1) << most) + t_.lanes;
    before_.resize(size), after_.resize(size), states_.resize(t_.T);
    back_.resize(overlaps * t_.T * (t_.wide ? 1 : 2));
  }

  // The tail-biting path for one tile; returns its states.
  const std::vector<int>& circle(const float* x, int seam) {
    run(x, t_.T - seam / 2, seam, -1);
    const int overlap = states_[seam / 2] & ((1 << (t_.L - t_.into(0))) - 1);
    run(x, 0, t_.T, overlap);
    return states_;
  }

 private:
  Across place(int k) const { return {log2i(t_.lanes), t_.L - k - log2i(t_.lanes), k}; }
  int cost_at(int q, int k) const { return t_.wide ? place(k).cost(q) : q; }
  uint8_t* back(int i) { return &back_[size_t(i) * (back_.size() / t_.T)]; }
  int winner(int i, int q, int k) { return t_.wide ? back(i)[place(k).back(q)] : ((uint16_t*)back(i))[q]; }

  // Searches n steps from step `first` on. fixed >= 0: the overlap at both ends; else both ends are free.
  void run(const float* x, int first, int n, int fixed) {
    const int k0 = t_.into(first);
    std::fill(before_.begin(), before_.end(), fixed < 0 ? 0.f : far);
    if (fixed >= 0) before_[cost_at(fixed, k0)] = 0.f;
    wrap(before_, t_.L - k0, t_.k[first]);
    for (int i = 0; i < n; i++) step(x, (first + i) % t_.T, back(i));

    const int k_end = t_.into(first + n);
    int q = std::max(fixed, 0);
    if (fixed < 0)
      for (int p = 1; p < 1 << (t_.L - k_end); p++)
        if (before_[cost_at(p, k_end)] < before_[cost_at(q, k_end)]) q = p;
    for (int i = n - 1; i >= 0; i--) {
      const int u = (first + i) % t_.T;
      states_[i] = q << t_.k[u] | winner(i, q, t_.k[u]);
      q = states_[i] & ((1 << (t_.L - t_.into(u))) - 1);
    }
  }

  void step(const float* x, int u, uint8_t* back) {
    const std::vector<float>& table = t_.tables.at(t_.stride(t_.k[u]));
    const Step step{x + int64_t(u) * t_.V, table.data(), before_.data(), after_.data(), back,
                    int64_t(table.size()) / t_.V, t_.L, t_.V, t_.into(u), t_.k[u]};
    (t_.wide ? across_for : along_for)[t_.row](step);
    wrap(after_, t_.L - t_.k[u], t_.k[(u + 1) % t_.T]);
    std::swap(before_, after_);
  }

  // A step `along` with more branches (2^k) than there are overlaps reads their costs round and round.
  void wrap(std::vector<float>& costs, int overlap_bits, int k) const {
    for (int i = 1 << overlap_bits; !t_.wide && i < 1 << k; i++) costs[i] = costs[i - (1 << overlap_bits)];
  }

  const Trellis& t_;
  std::vector<float> before_, after_;
  std::vector<uint8_t> back_;
  std::vector<int> states_;
};

double write(const Trellis& t, const std::vector<int>& states, const float* x, const float* values, uint8_t* codes) {
  double error = 0;
  int64_t p = 0;
  for (int u = 0; u < t.T; u++) {
    for (int b = 0; b < t.k[u]; b++, p++) codes[p / 8] |= uint8_t((states[u] >> b & 1) << p % 8);
    for (int v = 0; v < t.V; v++) {
      const double d = double(x[int64_t(u) * t.V + v]) - values[int64_t(states[u]) * t.V + v];
      error += d * d;
    }
  }
  return error;
}

}  // namespace
}  // namespace qf

int32_t qf_trellis_encode(const float* x, int64_t tiles, int64_t steps, const float* values, int32_t L, int32_t V,
                          const int32_t* bits, int32_t nbits, int64_t seam, int32_t threads, uint8_t* codes,
                          double* error) {
  using namespace qf;
  if (L < 8 || L > 16 || V < 1 || V > 2 || nbits < 1 || steps % nbits) return QF_UNSUPPORTED;
  int64_t string = 0;  // bits of a tile
  for (int64_t u = 0; u < steps; u++) {
    const int k = V * bits[u % nbits];
    if (k < 1 || k > L) return QF_UNSUPPORTED;
    string += k;
  }
  if (string < L) return QF_UNSUPPORTED;
  const int64_t bytes = (string + 7) / 8, batch = 16;
  const int around = int(seam > 0 && seam < steps ? seam : steps);
  try {
    const Trellis t = arrange(values, L, V, steps, bits, nbits);
    memset(codes, 0, size_t(tiles * bytes));
    const bool ok = parallel(threads, (tiles + batch - 1) / batch, [&](int64_t n) {
      Viterbi viterbi(t);
      for (int64_t i = n * batch; i < std::min(tiles, (n + 1) * batch); i++) {
        const float* tile = x + i * steps * V;
        error[i] = write(t, viterbi.circle(tile, around), tile, values, codes + i * bytes);
      }
    });
    return ok ? QF_OK : QF_NO_MEMORY;
  } catch (const std::bad_alloc&) {
    return QF_NO_MEMORY;
  }
}
