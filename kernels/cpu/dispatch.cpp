// The one table of instruction sets: best first, scalar last. QFORMAT_CPU forces a row by name.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>

#include "qformat.h"

namespace qf {
namespace {

struct Row {
  const char* name;
  int lanes;
  bool (*supported)();
};

const Row table[] = {
#if defined(__x86_64__)
    {"avx512", 16,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
     }},
    {"avx2", 8,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
     }},
#endif
    {"scalar", 4, [] { return true; }},
};
constexpr int rows = sizeof table / sizeof table[0];

int find(const char* name) {
  for (int i = 0; i < rows; i++)
    if (!strcmp(table[i].name, name)) return table[i].supported() ? i : -1;
  return -1;
}

int best() {
  const char* forced = getenv("QFORMAT_CPU");
  if (forced && find(forced) >= 0) return find(forced);
  int i = 0;
  while (!table[i].supported()) i++;
  return i;
}

std::atomic<int> chosen{-1};

}  // namespace

int variant() {
  int i = chosen.load(std::memory_order_relaxed);
  if (i < 0) chosen.store(i = best());
  return i;
}

int variant_lanes(int row) { return table[row].lanes; }

}  // namespace qf

int32_t qf_abi() { return QF_ABI; }
const char* qf_variant() { return qf::table[qf::variant()].name; }

int32_t qf_use(const char* name) {
  int i = qf::find(name);
  if (i < 0) return QF_UNSUPPORTED;
  qf::chosen.store(i);
  return QF_OK;
}
