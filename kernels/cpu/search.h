// The search for scales: every block tries a list of candidates and keeps the one with the smallest squared error.
//
// The candidates come from the codec's `encode`, which is the definition; here lies only the work that is proportional
// to elements times candidates. Results equal the definition's bit for bit, so errors are added as NumPy adds them:
// element by element where there are several blocks, pairwise where the whole matrix is one.
#pragma once
#include "dispatch.h"

namespace qf {

// W lanes of vectors of p elements, tried with one scale for each lane.
struct Trial {
  const void* codec;   // what the codec's kernel knows beside this: its levels or table
  const float* x;      // [n, W], element k of vector j in row j p + k
  int64_t n;
  const float *scale, *zero, *offset;  // [W]
  float* sums;         // [W] out: sum of squared differences; or null
  float* squares;      // [n, W] out: each of them; or null
  uint16_t* codes;     // [n / p, W] out; or null
};
struct Search {
  const void* codec;
  void (*kernel)(const Trial&);
  int lanes;  // its W
  const float* x;  // [n, blocks] with rows `stride` apart
  int64_t n, blocks, stride, p;
  int64_t candidates;
  const float *scale, *zero, *offset;  // [candidates, blocks]; null: all zero_value, all 0
  float zero_value;
  bool whole;       // blocks is 1 and the only one
  uint16_t* codes;  // [n / p, blocks] with rows `stride` apart
  int32_t* best;    // [blocks] the candidate taken
  int threads;
};

bool search(const Search& s);

}  // namespace qf
