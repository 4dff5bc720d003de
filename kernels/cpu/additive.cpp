// `additive`: tiles that are sums of entries of several books (spec/codecs/additive.md).
#include "weight.h"

namespace qf {
namespace {

constexpr int64_t most_codes = 1024;  // unpacked at a time; the longest run has 8 groups of 64 books

// The tiles of `groups` neighbouring groups. IN: columns of a tile, 0 where they are not known beforehand.
template <int IN, class Code> QF_INLINE void add_up(const qf_additive& w, const Code* codes, int64_t groups, float* out,
                                                    int64_t ld) {
  const int64_t in = IN ? IN : w.in_group, tile = w.out_group * in, book = tile << w.bits;
  for (int64_t g = 0; g < groups; g++, codes += w.books)
    for (int64_t r = 0; r < w.out_group; r++) {
      float* to = out + r * ld + g * in;
      const float* from = w.table + codes[0] * tile + r * in;
      for (int64_t k = 0; k < in; k++) to[k] = from[k];
      for (int64_t m = 1; m < w.books; m++) {
        from = w.table + m * book + codes[m] * tile + r * in;
        for (int64_t k = 0; k < in; k++) to[k] += from[k];
      }
    }
}

template <class Code> QF_INLINE void rows_of(const qf_additive& w, const Block& b) {
  Code codes[most_codes + 8];
  const int64_t in = w.in_group, run_codes = w.run * w.books;
  const int64_t step = std::max<int64_t>(1, most_codes / run_codes) * w.run;  // groups at a time: whole runs
  for (int64_t r = b.r0; r < b.r1; r += w.out_group) {
    const uint8_t* row = w.codes + r / w.out_group * w.row_bytes;
    for (int64_t g = b.c0 / in; g < b.c1 / in; g += step) {
      const int64_t groups = std::min(step, b.c1 / in - g);
      unpack(row + g * w.books * w.bits / 8, w.bits, groups * w.books, codes);
      float* out = b.out + (r - b.r0) * b.ld + g * in - b.c0;
      if (in == 4) add_up<4>(w, codes, groups, out, b.ld);
      else if (in == 8) add_up<8>(w, codes, groups, out, b.ld);
      else if (in == 16) add_up<16>(w, codes, groups, out, b.ld);
      else add_up<0>(w, codes, groups, out, b.ld);
    }
  }
}

template <int W> QF_INLINE void decode(const Block& b) {
  const qf_additive& w = *(const qf_additive*)b.matrix;
  if (w.bits <= 8) rows_of<uint8_t>(w, b);
  else rows_of<uint16_t>(w, b);
  apply_scales(b, w.grid, w.scales);
}

QF_DISPATCH(decode, Block)

}  // namespace

const Decoder decode_additive = decode_for;

}  // namespace qf
