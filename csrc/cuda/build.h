// The CUDA part of the extension: there where nvcc was found when it was built.
#pragma once

namespace fastcl {
namespace cuda {

// The CUDA runtime that is linked in, as 1000 * major + 10 * minor.
int runtime_version();

// The architectures whose machine code is in the extension, as CMake names them.
const char* architectures();

}  // namespace cuda
}  // namespace fastcl
