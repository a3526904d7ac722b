// The kernels for one instruction set. CMake compiles this file once for each, with the compiler
// flags that allow it and FASTCL_ISA (a namespace) and FASTCL_VECTOR_BYTES set.
#include "sigmoid.h"
#include "softmax.h"

namespace fastcl {
namespace FASTCL_ISA {

template <class T>
Kernels<T> table() {
  return {softmax_statistics<T>, softmax_gradient<T>, softmax_online<T>, sigmoid<T>};
}
template Kernels<float> table<float>();
template Kernels<double> table<double>();

}  // namespace FASTCL_ISA
}  // namespace fastcl
