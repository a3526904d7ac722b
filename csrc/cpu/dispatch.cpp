// Chooses, once, the widest kernels that this processor can run.
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include <pthread.h>

#ifdef FASTCL_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "amx.h"
#include "runtime.h"
#include "tile.h"

namespace fastcl {

#define FASTCL_DECLARE(isa) \
  namespace isa { template <class T> Kernels<T> table(); \
  extern template Kernels<float> table<float>(); extern template Kernels<double> table<double>(); }
FASTCL_DECLARE(plain)
#ifdef FASTCL_X86
FASTCL_DECLARE(avx2)
FASTCL_DECLARE(avx512)
#endif

namespace {

enum class Isa { plain, avx2, avx512 };

Isa best_isa() {
#ifdef FASTCL_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::plain;
}

Isa chosen_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("FASTCL_CPU_ISA");
  if (!wanted || !*wanted) return best;
  const std::string name = wanted;
  const Isa isa = name == "plain" ? Isa::plain : name == "avx2" ? Isa::avx2 : Isa::avx512;
  if (name != "plain" && name != "avx2" && name != "avx512")
    throw std::runtime_error("FASTCL_CPU_ISA is '" + name + "'; it may be plain, avx2 or avx512");
  if (isa > best)
    throw std::runtime_error("FASTCL_CPU_ISA is '" + name + "', which this processor cannot run");
  return isa;
}

Isa isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

template <class T>
Kernels<T> table_of(Isa which) {
#ifdef FASTCL_X86
  if (which == Isa::avx512) return avx512::table<T>();
  if (which == Isa::avx2) return avx2::table<T>();
#endif
  (void)which;
  return plain::table<T>();
}

bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

const char* isa_name() {
  const Isa which = isa();
  return which == Isa::avx512 ? "avx512" : which == Isa::avx2 ? "avx2" : "plain";
}

template <class T>
const Kernels<T>& kernels() {
  static const Kernels<T> table = table_of<T>(isa());
  return table;
}
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

bool in_forked_child() { return (void)registered, forked; }

namespace amx {

// Here and not in amx.cpp, which is compiled for processors that have it.
bool available() {
#ifdef FASTCL_AMX
  static const bool yes = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tiles = (d >> 24) & 1, products = (d >> 22) & 1;           // AMX-TILE, AMX-BF16
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
    const bool rounding = (a >> 5) & 1;                                   // AVX512-BF16
    if (isa() != Isa::avx512 || !tiles || !products || !rounding) return false;
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return yes;
#else
  return false;
#endif
}

}  // namespace amx

Scratch::Scratch(std::size_t bytes)
    : data_(bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr) {
  if (bytes && !data_) throw std::bad_alloc();
}
Scratch::~Scratch() { std::free(data_); }

}  // namespace fastcl
