// What the decoders of packed matrices share.
#pragma once
#include <algorithm>

#include "dispatch.h"
#include "qformat.h"

namespace qf {

constexpr int64_t widest = 1024;  // columns of a Block at most, unless col_unit is larger

// Decode rows [r0, r1), columns [c0, c1) to out[0], out[ld], ...; r0 and c0 are multiples of the matrix's units.
struct Block {
  const qf_matrix* matrix;
  int64_t r0, r1, c0, c1;
  float* out;
  int64_t ld;
};
using Decoder = void (*const*)(const Block&);  // one for each instruction set
extern const Decoder decode_int, decode_table, decode_trellis, decode_additive, decode_float, decode_e8p, decode_sum,
    decode_dense;

void decode(const Block& b);  // by the decoder of its codec

QF_INLINE float from_bits(uint32_t bits) { return load<float>(&bits); }

QF_INLINE float from_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | rest << 13);
  if (rest >= 0x0400) return from_bits(sign | ((rest << 13) + 0x38000000));
  const float subnormal = float(rest) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

// The nearest half, ties to even.
QF_INLINE uint16_t to_half(float x) {
  const uint32_t bits = load<uint32_t>(&x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // from the middle between the largest half and infinity
  if (rest < 0x38800000) {  // subnormal: the unit of such a sum is that of the result
    const float sum = from_bits(rest) + 0.5f;
    return uint16_t(sign | (load<uint32_t>(&sum) - 0x3f000000));
  }
  return uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
}

QF_INLINE uint16_t to_bfloat(float x) {
  const uint32_t bits = load<uint32_t>(&x);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

QF_INLINE float at(const qf_values& v, int64_t i) {
  switch (v.dtype) {
    case QF_FLOAT32: return ((const float*)v.data)[i];
    case QF_FLOAT16: return from_half(((const uint16_t*)v.data)[i]);
    case QF_BFLOAT16: return from_bits(uint32_t(((const uint16_t*)v.data)[i]) << 16);
    case QF_UINT8: return ((const uint8_t*)v.data)[i];
    default: return ((const int16_t*)v.data)[i];
  }
}

QF_INLINE int64_t block_of(const qf_grid& g, int64_t r, int64_t c) { return r / g.rows * g.across + c / g.cols; }
QF_INLINE int64_t block_end(const qf_grid& g, int64_t c, int64_t end) {
  return std::min(end, (c / g.cols + 1) * g.cols);
}

// Multiply rows of a decoded block by the scales of their blocks.
QF_INLINE void apply_scales(const Block& b, const qf_grid& grid, const qf_values& scales) {
  if (scales.dtype == QF_NONE) return;
  for (int64_t r = b.r0; r < b.r1; r++)
    for (int64_t c = b.c0, end; c < b.c1; c = end) {
      end = block_end(grid, c, b.c1);
      const float scale = at(scales, block_of(grid, r, c));
      float* out = b.out + (r - b.r0) * b.ld - b.c0;
      for (int64_t i = c; i < end; i++) out[i] *= scale;
    }
}

// Every field of 2 n bits in x, where fields lie `step` bits apart, becomes two fields of n bits, step / 2 bits apart.
QF_INLINE uint64_t halve(uint64_t x, int64_t n, int64_t step, uint64_t ones) {
  const uint64_t low = ((uint64_t(1) << n) - 1) * ones;
  return (x & low) | (x << (step / 2 - n) & low << step / 2);
}

// Eight codes of `bits` bits to a byte each.
QF_INLINE uint64_t to_bytes(uint64_t x, int64_t bits) {
  return halve(halve(halve(x, 4 * bits, 64, 1), 2 * bits, 32, 0x0000000100000001), bits, 16, 0x0001000100010001);
}

template <class Group> QF_INLINE void unpack_groups(const uint8_t* packed, int64_t groups, uint8_t* out) {
  for (int64_t g = 0; g < groups; g++)
    store(out + 8 * g, to_bytes(load<Group>(packed + sizeof(Group) * g), sizeof(Group)));
}

// n codes of `bits` bits each, the first at a byte boundary, to uint8 (up to 8 bits) or uint16. Reads nothing beyond
// the last code's byte and may write up to a group more. As the files, so the machine: little-endian.
QF_INLINE void unpack(const uint8_t* packed, int64_t bits, int64_t n, uint8_t* out) {
  if (bits == 8) return (void)memcpy(out, packed, size_t(n));
  const int64_t bytes = (n * bits + 7) / 8;
  int64_t g = 0;  // groups of eight codes: `bits` bytes
  if (bits == 1 || bits == 2 || bits == 4) g = n / 8;
  if (bits == 1) unpack_groups<uint8_t>(packed, g, out);
  if (bits == 2) unpack_groups<uint16_t>(packed, g, out);
  if (bits == 4) unpack_groups<uint32_t>(packed, g, out);
  for (; g * bits + 8 <= bytes; g++) store(out + 8 * g, to_bytes(load<uint64_t>(packed + g * bits), bits));
  for (; g * bits < bytes; g++) {
    uint64_t x = 0;
    memcpy(&x, packed + g * bits, size_t(std::min<int64_t>(8, bytes - g * bits)));
    store(out + 8 * g, to_bytes(x, bits));
  }
}

QF_INLINE void unpack(const uint8_t* packed, int64_t bits, int64_t n, uint16_t* out) {
  if (bits == 16) return (void)memcpy(out, packed, size_t(n) * 2);
  const int64_t bytes = (n * bits + 7) / 8;
  for (int64_t bit = 0; bit < n * bits; bit += 4 * bits, out += 4) {  // four codes, from the middle of a byte perhaps
    uint64_t x = 0;
    memcpy(&x, packed + bit / 8, size_t(std::min<int64_t>(8, bytes - bit / 8)));
    x = halve(x >> bit % 8, 2 * bits, 64, 1);
    store(out, halve(x, bits, 32, 0x0000000100000001));
  }
}

}  // namespace qf
