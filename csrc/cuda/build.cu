// What the CUDA part was built with. Kernels come beside this file once one wins a measurement over
// Triton's or needs a grid-wide barrier; CMakeLists.txt compiles every .cu of this folder.
#include "build.h"

#include <cuda_runtime_api.h>

namespace fastcl {
namespace cuda {

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

const char* architectures() { return FASTCL_CUDA_ARCHITECTURES; }

}  // namespace cuda
}  // namespace fastcl
