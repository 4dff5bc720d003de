// Run-time choice of the instruction set, and how a kernel is written once for all of them.
//
// A kernel is a template over W, the number of float lanes, that takes one struct of arguments. It is written in plain
// loops and in the compilers' own vector types, and QF_DISPATCH compiles it once per instruction set:
//
//     template <int W> QF_INLINE void add(const Add& a) { ... }
//     QF_DISPATCH(add, Add)            // defines the array add_for[], in the order of the table in dispatch.cpp
//     add_for[variant()](a);
//
// Nothing here may depend on the instruction set in the last bit: the build forbids contraction of a*b+c to a fused
// multiply-add (-ffp-contract=off), so that every variant gives equal results; linear.cpp alone allows it and says so.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#define QF_INLINE inline __attribute__((always_inline))
#else
#error "the native library needs GCC's vector types (GCC or Clang)"
#endif

#if defined(__x86_64__)
#define QF_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")))
#define QF_AVX2 __attribute__((target("avx2,fma,f16c,bmi2")))
#define QF_DISPATCH(kernel, Args)                                       \
  QF_AVX512 static void kernel##_avx512(const Args& a) { kernel<16>(a); } \
  QF_AVX2 static void kernel##_avx2(const Args& a) { kernel<8>(a); }      \
  static void kernel##_scalar(const Args& a) { kernel<4>(a); }            \
  static void (*const kernel##_for[])(const Args&) = {kernel##_avx512, kernel##_avx2, kernel##_scalar};
#else
#define QF_DISPATCH(kernel, Args)                              \
  static void kernel##_scalar(const Args& a) { kernel<4>(a); } \
  static void (*const kernel##_for[])(const Args&) = {kernel##_scalar};
#endif

namespace qf {

int variant();               // row of the table in dispatch.cpp that is in use
int variant_lanes(int row);  // its W

template <int W> struct Lanes {
  typedef float f __attribute__((vector_size(4 * W)));
  typedef int32_t i __attribute__((vector_size(4 * W)));
};

template <class T> QF_INLINE T load(const void* p) {
  typedef T any __attribute__((aligned(1), may_alias));
  return *(const any*)p;
}
template <class T> QF_INLINE void store(void* p, const T& v) {
  typedef T any __attribute__((aligned(1), may_alias));
  *(any*)p = v;
}

// v[from[0]], v[from[1]], ...
template <int W, class F, class I> QF_INLINE F permute(const F& v, const I& from) {
#if defined(__clang__)
  F out;
  for (int l = 0; l < W; l++) out[l] = v[from[l]];
  return out;
#else
  return __builtin_shuffle(v, from);
#endif
}

}  // namespace qf
