// The C interface of the native library: what kernels/native.py and kernels/cpu/*.py call through ctypes.
//
// Nothing here knows Python or torch, and ort.cpp alone knows ONNX Runtime. All arrays are C-contiguous but where
// strides are given; the caller owns all memory and has checked every size. A function returns QF_OK, or QF_UNSUPPORTED
// for settings it has no kernel for, or QF_NO_MEMORY. `threads` = 0 means one per core; no result depends on it.
#pragma once
#include <stdint.h>

#define QF_ABI 8  // raised with every change of this file; kernels/native.py holds the same number

#if defined(__cplusplus)
#define QF_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define QF_EXPORT __attribute__((visibility("default")))
#endif

enum { QF_OK = 0, QF_UNSUPPORTED = -1, QF_NO_MEMORY = -2 };

QF_EXPORT int32_t qf_abi(void);
QF_EXPORT const char* qf_variant(void);          // name of the instruction set in use: avx512, avx2, scalar
QF_EXPORT int32_t qf_use(const char* variant);  // use another one from now on; QF_UNSUPPORTED: not on this machine

// Packed matrices. Every one begins with a qf_matrix, and its own type says what follows.
enum { QF_INT = 0, QF_TABLE = 1, QF_TRELLIS = 2, QF_ADDITIVE = 3, QF_FLOAT = 4, QF_E8P = 5,
       QF_SUM = 6, QF_DENSE = 7 };  // codec, or what stands for none
enum { QF_NONE = 0, QF_FLOAT32 = 1, QF_FLOAT16 = 2, QF_BFLOAT16 = 3, QF_UINT8 = 4, QF_INT16 = 5 };  // dtype

typedef struct {
  int64_t codec, rows, cols;
  int64_t row_unit, col_unit;  // powers of two: a decoder is asked for stretches that begin at multiples of them
} qf_matrix;

typedef struct {  // one value for each block: that of element (r, c) is number r / rows * across + c / cols
  int64_t rows, cols, across;
} qf_grid;

typedef struct {
  const void* data;
  int64_t dtype;
} qf_values;

typedef struct {  // value = (code - zero) * scale, or code * scale + offset where there are offsets
  qf_matrix matrix;   // row_unit 1, col_unit 8
  const uint8_t* codes;  // [rows, ceil(cols * bits / 8)]
  int64_t bits;
  qf_grid grid;  // of scales, zeros and offsets
  qf_values scales, zeros, offsets;
  const int32_t* groups;  // [cols] column -> its scale's column of `across`; or null: by the grid
  float zero;             // where there are no zeros
} qf_int;

typedef struct {  // value = table[code] * scale + offset
  qf_matrix matrix;      // row_unit 1, col_unit 8 p
  const uint8_t* codes;  // [rows, ceil(cols / p * bits / 8)]
  int64_t bits, p;       // 1 to 16; 1, 2, 4 or 8
  const float* table;    // [2^bits, p]
  qf_grid grid;
  qf_values scales, offsets;  // or QF_NONE
} qf_table;

typedef struct {  // value = values[state] * scale
  qf_matrix matrix;      // units: the tile
  const uint8_t* codes;  // [rows / row_unit, cols / col_unit, string_bits / 8]
  int64_t L, V, string_bits;
  const int32_t* starts;  // [steps] the bit at which a step's state starts
  const float* values;    // [2^L, V]
  const int32_t* place;   // [steps * V] where in the row-major tile value v of step u goes, at u V + v
  qf_grid grid;
  qf_values scales;  // or QF_NONE
} qf_trellis;

typedef struct {  // value = (table[0][code 0] + table[1][code 1] + ...) * scale, over tiles
  qf_matrix matrix;      // row_unit out_group, col_unit run * in_group
  const uint8_t* codes;  // [rows / out_group, row_bytes]: the books' codes of a group side by side
  int64_t bits, books;   // 1 to 16; up to 64
  int64_t out_group, in_group, run, row_bytes;  // run: groups whose codes fill whole bytes
  const float* table;    // [books, 2^bits, out_group, in_group]
  qf_grid grid;
  qf_values scales;  // or QF_NONE
} qf_additive;

typedef struct {  // value = table[code] * scale * last
  qf_matrix matrix;      // row_unit 1, col_unit 8 p
  const uint8_t* codes;  // [rows, ceil(cols / p * bits / 8)]
  int64_t bits, p;       // 4 to 8; 1 or 2
  const float* table;    // [2^bits, p]
  qf_grid grid;
  qf_values scales;            // or QF_NONE
  const float* scale_numbers;  // [256] what scales of 8 bits stand for, a global scale taken in; or null
  float last;                  // 1 where there is none
} qf_float;

typedef struct {  // value = numbers[32 + quarters] * scale, the quarters of a point of the lattice
  qf_matrix matrix;      // row_unit 1, col_unit 8
  const uint8_t* codes;  // [rows, cols / 8, bits]
  int64_t bits;          // 1: the number of a point; 2: signs, the number of a pattern
  const int8_t* points;  // [256, 8] points or patterns, in quarters
  const float* numbers;  // [64]
  qf_grid grid;
  qf_values scales;  // or QF_NONE
} qf_e8p;

typedef struct {  // value = the terms', added in order
  qf_matrix matrix;  // units: the largest of the terms'
  const qf_matrix* const* terms;
  int64_t count;
  int64_t dtype;  // rounded to it after each addition
} qf_sum;

typedef struct {  // for what no other type describes
  qf_matrix matrix;  // row_unit 1, col_unit 1
  const float* data;  // [rows, cols]
} qf_dense;

// One side of the rotation around a matrix (spec/README.md, Rotation). Null stands for what a side does not have.
typedef struct {
  int64_t length, size;  // of the side, and of a block of U; 1: no U
  int64_t order;           // of the Hadamard matrix in U = hadamard ⊗ Sylvester / √size
  const float* hadamard;   // [order, order]
  const float* matrix;     // [size, size] in place of it
  const float* scale;      // [length]
  const int32_t* perm;     // [length]
  const int32_t* inverse;  // [length] of perm
} qf_side;

// A weight as a model has it: W = D·P·U · stored · Uᵀ·Pᵀ·D + outside, cut to [rows, cols].
typedef struct {
  int64_t rows, cols;
  const qf_matrix* stored;
  qf_side in, out;
  const qf_matrix* const* outside;
  int64_t outsides;
} qf_weight;

// Rows [r0, r1) as float32 [r1 - r0, cols]; r0 is a multiple of row_unit.
QF_EXPORT int32_t qf_decode(const qf_matrix* matrix, int64_t r0, int64_t r1, float* out, int32_t threads);

// The given rows as float32 [n, cols].
QF_EXPORT int32_t qf_embedding(const qf_matrix* matrix, const int64_t* rows, int64_t n, float* out, int32_t threads);

// y [m, rows] = x [m, cols] times the transposed matrix, all float32. A row of y depends on its row of x alone.
QF_EXPORT int32_t qf_linear(const qf_matrix* matrix, const float* x, int64_t m, float* y, int32_t threads);

// The same two for a whole weight: y [m, weight rows] of x [m, weight cols]; out [n, weight cols].
QF_EXPORT int32_t qf_weight_linear(const qf_weight* weight, const float* x, int64_t m, float* y, int32_t threads);
QF_EXPORT int32_t qf_weight_embedding(const qf_weight* weight, const int64_t* rows, int64_t n, float* out,
                                      int32_t threads);

// The tail-biting path of least squared error through a bitshift trellis, tile by tile (spec/codecs/trellis.md).
//   x       [tiles, steps * V]   elements in the order of their numbers, divided by their scales
//   values  [2^L, V]             what every state decodes to
//   bits    [nbits]              bits per weight, cyclic over the steps; nbits divides steps
//   seam    steps of the first search, around the place where the circle closes; 0: all of them
//   codes   [tiles, ceil(N / 8)] out: the cyclic strings
//   error   [tiles]              out: sum of squared differences
QF_EXPORT int32_t qf_trellis_encode(const float* x, int64_t tiles, int64_t steps, const float* values, int32_t L,
                                    int32_t V, const int32_t* bits, int32_t nbits, int64_t seam, int32_t threads,
                                    uint8_t* codes, double* error);

// Which of the candidates suits each block best, and the codes that go with it (qformat/codecs/int.py, encode).
//   x       [n, blocks]           elements of a block down, blocks across; rows lie `stride` apart, those of codes too
//   scale   [candidates, blocks]  and zero and offset likewise; a null zero means zero_value, a null offset 0
//   whole   1 where the matrix is a single block: its errors are summed in another order
//   codes   [n, blocks]           out
//   best    [blocks]              out: the number of the candidate
QF_EXPORT int32_t qf_int_search(const float* x, int64_t n, int64_t blocks, int64_t stride, int64_t candidates,
                                const float* scale, const float* zero, const float* offset, float zero_value, float top,
                                int32_t whole, int32_t threads, uint16_t* codes, int32_t* best);

// The same for vectors of p elements and the nearest of the entries of a table (qformat/codecs/table.py, encode).
//   values  [entries, p], p 1, 2, 4, 8 or 16
//   borders p = 1: [entries - 1] the middles between neighbouring levels, ascending; else [entries] |entry|^2 / 2
//   order   p = 1: [entries] the entry of each level, ascending; else null
//   codes   [n / p, blocks]  out
QF_EXPORT int32_t qf_table_search(const float* x, int64_t n, int64_t blocks, int64_t stride, int64_t candidates,
                                  const float* scale, int64_t p, int64_t entries, const float* values,
                                  const float* borders, const int32_t* order, int32_t whole, int32_t threads,
                                  uint16_t* codes, int32_t* best);

// The code of the point nearest to each vector (qformat/codecs/e8p.py, nearest).
//   x      [n, 8]
//   table  [256, 8]   of the patterns with 2 bits, of the points with 1
//   codes  [n, bits]  out
QF_EXPORT int32_t qf_e8p_search(const float* x, int64_t n, int64_t bits, const float* table, int32_t threads,
                                uint8_t* codes);

// For ONNX Runtime (ort.cpp): makes the weight of a node, whose attributes are given, from its constant inputs; it must
// outlive the session. Null: it cannot, and `message` says why. To be set before RegisterCustomOps is called.
typedef const qf_weight* (*qf_prepare)(const char* entry, const char* weight, const void* node, char* message,
                                       int64_t size);
QF_EXPORT void qf_ort_use(qf_prepare prepare);

// Input `index` of such a node: its data and number of elements; null data where it is no constant.
QF_EXPORT int32_t qf_ort_constant(const void* node, int64_t index, const void** data, int64_t* count);

// A permutation of the bits of a block of 32-bit words: each target word is the union of its terms.
typedef struct {
  int64_t sources, targets;  // words of a block
  int64_t count;
  const int32_t* terms;   // [count, 3] target word, ascending; source word; shift, upward, or downward where below 0
  const uint32_t* masks;  // [count] bits of the source word
} qf_permutation;

// The same permutation for every block. Their positions have four axes, of the given sizes.
//   in       [sources]  word i of the block at the first position; the others' lie by in_strides[4], in bytes
//   out      [targets]  likewise
QF_EXPORT int32_t qf_permute(const qf_permutation* p, const int64_t* sizes, const void* const* in,
                             const int64_t* in_strides, void* const* out, const int64_t* out_strides);
