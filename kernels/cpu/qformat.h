// The C interface of the native library: what kernels/native.py and kernels/cpu/*.py call through ctypes.
//
// Nothing here knows Python, torch or ONNX Runtime. All arrays are C-contiguous; the caller owns all memory and has
// checked every size. A function returns QF_OK, or QF_UNSUPPORTED for settings it has no kernel for, or QF_NO_MEMORY.
// `threads` = 0 means one per core; no result depends on it.
#pragma once
#include <stdint.h>

#define QF_ABI 1  // raised with every change of this file; kernels/native.py holds the same number

#if defined(__cplusplus)
#define QF_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define QF_EXPORT __attribute__((visibility("default")))
#endif

enum { QF_OK = 0, QF_UNSUPPORTED = -1, QF_NO_MEMORY = -2 };

QF_EXPORT int32_t qf_abi(void);
QF_EXPORT const char* qf_variant(void);          // name of the instruction set in use: avx512, avx2, scalar
QF_EXPORT int32_t qf_use(const char* variant);  // use another one from now on; QF_UNSUPPORTED: not on this machine

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
