// A parallel loop over blocks of rows.
//
// The block size never depends on the number of threads, so neither does any result. In a forked
// child OpenMP's pool is gone and waiting for it would hang: there the loop runs serially.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace fastcl {
namespace FASTCL_ISA {

template <class Body>
void for_each_block(std::int64_t blocks, int threads, const Body& body) {
  if (threads <= 1 || blocks <= 1 || in_forked_child()) {
    for (std::int64_t b = 0; b < blocks; ++b) body(b);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
  for (std::int64_t b = 0; b < blocks; ++b) body(b);
}

}  // namespace FASTCL_ISA
}  // namespace fastcl
