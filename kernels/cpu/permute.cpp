// One permutation of bits for very many blocks of words: what re-laying codes takes. Layouts and the NumPy form:
// converters/importers/_permute.py.
#include <algorithm>
#include <new>
#include <vector>

#include "dispatch.h"
#include "qformat.h"

namespace qf {
namespace {

constexpr int lanes = 64;  // blocks that are done side by side

struct Args {
  const qf_permutation* p;
  const uint32_t* in;  // [words of a block, lanes]
  uint32_t* out;
};

template <int W> struct Words {
  typedef uint32_t v __attribute__((vector_size(4 * W)));
};

template <int W> QF_INLINE void permute_lanes(const Args& a) {
  using V = typename Words<W>::v;
  constexpr int several = 4;
  for (int first = 0; first < lanes; first += several * W)
    for (int64_t t = 0, target = 0; target < a.p->targets; target++) {
      V word[several] = {};
      for (; t < a.p->count && a.p->terms[3 * t] == target; t++) {
        const uint32_t* source = a.in + a.p->terms[3 * t + 1] * lanes + first;
        const uint32_t mask = a.p->masks[t];
        const int up = a.p->terms[3 * t + 2];
        if (up < 0)
          for (int i = 0; i < several; i++) word[i] |= (load<V>(source + i * W) & mask) >> -up;
        else
          for (int i = 0; i < several; i++) word[i] |= (load<V>(source + i * W) & mask) << up;
      }
      for (int i = 0; i < several; i++) store<V>(a.out + target * lanes + first + i * W, word[i]);
    }
}
QF_DISPATCH(permute_lanes, Args)

// Where the blocks lie: a walk over the positions in row-major order.
struct Walk {
  const int64_t *sizes, *strides;
  int64_t at[4] = {}, offset = 0;

  // The offsets of the next ones; whether these lie side by side.
  bool take(int count, int64_t* offsets) {
    const bool together = count <= sizes[3] - at[3] && strides[3] == 4;
    for (int l = 0; l < count;) {
      const int run = int(std::min<int64_t>(count - l, sizes[3] - at[3]));
      for (int i = 0; i < run; i++) offsets[l + i] = offset + i * strides[3];
      l += run, at[3] += run, offset += run * strides[3];
      for (int axis = 3; axis > 0 && at[axis] == sizes[axis]; axis--) {
        offset += strides[axis - 1] - sizes[axis] * strides[axis];
        at[axis] = 0, at[axis - 1]++;
      }
    }
    return together;
  }
};

void run(const qf_permutation& p, const int64_t* sizes, const void* const* in, const int64_t* in_strides,
         void* const* out, const int64_t* out_strides) {
  std::vector<uint32_t> before(p.sources * lanes), after(p.targets * lanes);
  int64_t from[lanes], to[lanes];
  Walk source{sizes, in_strides}, target{sizes, out_strides};
  const int64_t total = sizes[0] * sizes[1] * sizes[2] * sizes[3];
  for (int64_t done = 0; done < total; done += lanes) {
    const int count = int(std::min<int64_t>(lanes, total - done));
    const bool joined = source.take(count, from), kept = target.take(count, to);
    for (int64_t w = 0; w < p.sources; w++) {
      const char* words = (const char*)in[w];
      if (joined) std::memcpy(&before[w * lanes], words + from[0], 4 * count);
      else
        for (int l = 0; l < count; l++) before[w * lanes + l] = load<uint32_t>(words + from[l]);
    }
    permute_lanes_for[variant()]({&p, before.data(), after.data()});
    for (int64_t w = 0; w < p.targets; w++) {
      char* words = (char*)out[w];
      if (kept) std::memcpy(words + to[0], &after[w * lanes], 4 * count);
      else
        for (int l = 0; l < count; l++) store(words + to[l], after[w * lanes + l]);
    }
  }
}

}  // namespace
}  // namespace qf

int32_t qf_permute(const qf_permutation* p, const int64_t* sizes, const void* const* in, const int64_t* in_strides,
                   void* const* out, const int64_t* out_strides) {
  try {
    qf::run(*p, sizes, in, in_strides, out, out_strides);
    return QF_OK;
  } catch (const std::bad_alloc&) {
    return QF_NO_MEMORY;
  }
}
