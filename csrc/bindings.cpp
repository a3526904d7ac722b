// fastcl._C: the compiled kernels as Python functions of addresses, sizes and strides.
//
// Nothing of PyTorch is linked. The caller (fastcl/kernels/cpu) owns every tensor, keeps it alive
// for the call, and passes 0 for what is absent.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/amx.h"
#include "cpu/tile.h"
#include "cuda/build.h"

namespace py = pybind11;
using namespace fastcl;

namespace {

using Address = std::uintptr_t;
template <class T> T* pointer(Address a) { return reinterpret_cast<T*>(a); }

template <class T>
Tile<T> make_tile(Address s, std::int64_t rows, std::int64_t cols, std::int64_t ld, Address scale,
                  std::int64_t scale_stride, Address row_bias, std::int64_t row_bias_stride,
                  Address col_bias, Address row_ids, Address col_ids, py::object diagonal,
                  Address diagonal_s, Address diagonal_l) {
  using Id = typename Tile<T>::Id;
  return {pointer<T>(s), rows, cols, ld, pointer<const T>(scale), scale_stride,
          pointer<const T>(row_bias), row_bias_stride, pointer<const T>(col_bias),
          pointer<const Id>(row_ids), pointer<const Id>(col_ids),
          diagonal.is_none() ? kNoDiagonal : diagonal.cast<std::int64_t>(),
          pointer<T>(diagonal_s), pointer<T>(diagonal_l)};
}

template <class T>
void define(py::module_& m, const char* tile_name) {
  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<Tile<T>>(m, tile_name)
      .def(py::init(&make_tile<T>), py::kw_only(), py::arg("s"), py::arg("rows"), py::arg("cols"),
           py::arg("ld"), py::arg("scale"), py::arg("scale_stride"), py::arg("row_bias"),
           py::arg("row_bias_stride"), py::arg("col_bias"), py::arg("row_ids"), py::arg("col_ids"),
           py::arg("diagonal"), py::arg("diagonal_s"), py::arg("diagonal_l"));
  m.def("softmax_statistics",
        [](const Tile<T>& tile, Address row_max, Address row_sum, Address col_max, Address col_sum,
           int threads) {
          kernels<T>().softmax_statistics(tile, {pointer<T>(row_max), pointer<T>(row_sum)},
                                          {pointer<T>(col_max), pointer<T>(col_sum)}, threads);
        },
        Released());
  m.def("softmax_gradient",
        [](const Tile<T>& tile, Address row_max, Address row_weight, Address col_max,
           Address col_weight, Address row_gs, Address row_g, Address col_g, int threads) {
          kernels<T>().softmax_gradient(
              tile, {pointer<const T>(row_max), pointer<const T>(row_weight)},
              {pointer<const T>(col_max), pointer<const T>(col_weight)},
              {pointer<T>(row_gs), pointer<T>(row_g), pointer<T>(col_g)}, threads);
        },
        Released());
  m.def("softmax_online",
        [](const Tile<T>& tile, Address row_max, Address row_sum, Address row_es, Address rescale,
           int threads) {
          kernels<T>().softmax_online(tile, {pointer<T>(row_max), pointer<T>(row_sum)},
                                      pointer<T>(row_es), pointer<T>(rescale), threads);
        },
        Released());
  m.def("sigmoid",
        [](const Tile<T>& tile, Address row_loss, Address row_weight, bool gradient,
           Address row_gs, Address row_g, Address col_g, int threads) {
          kernels<T>().sigmoid(tile, pointer<T>(row_loss), pointer<const T>(row_weight), gradient,
                               {pointer<T>(row_gs), pointer<T>(row_g), pointer<T>(col_g)}, threads);
        },
        Released());
}

void define_amx(py::module_& m) {
  using Released = py::call_guard<py::gil_scoped_release>;
  m.def("amx_available", &amx::available, "bfloat16 products with float32 accumulators are there.");
  m.def("amx_packed_bytes", &amx::packed_bytes);
  py::enum_<amx::Form>(m, "AmxForm")
      .value("left", amx::Form::left)
      .value("right_of_transpose", amx::Form::right_of_transpose)
      .value("right", amx::Form::right);
  m.def("amx_pack",
        [](Address x, std::int64_t rows, std::int64_t cols, std::int64_t ld, amx::Form form,
           Address packed, int threads) {
          amx::pack(pointer<const std::uint16_t>(x), rows, cols, ld, form, pointer<void>(packed),
                    threads);
        },
        Released());
  m.def("amx_pack_split",
        [](Address x, std::int64_t rows, std::int64_t cols, std::int64_t ld, Address packed,
           Address transposed, int threads) {
          amx::pack_split(pointer<const float>(x), rows, cols, ld, pointer<void>(packed),
                          pointer<void>(transposed), threads);
        },
        Released());
  m.def("amx_multiply",
        [](Address left, Address right, std::int64_t m, std::int64_t n, std::int64_t k, Address out,
           std::int64_t ld, bool accumulate, int threads) {
          amx::multiply(pointer<const void>(left), pointer<const void>(right), m, n, k,
                        pointer<float>(out), ld, accumulate, threads);
        },
        Released());
}

#ifdef FASTCL_CUDA
int cuda_runtime() { return cuda::runtime_version(); }
std::string cuda_architectures() { return cuda::architectures(); }
#else
int cuda_runtime() { return 0; }
std::string cuda_architectures() { return ""; }
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastcl; see csrc/.";
  m.def("isa", &isa_name, "Instruction set in use: avx512, avx2 or plain.");
  define<float>(m, "TileF32");
  define<double>(m, "TileF64");
  define_amx(m);
  m.def("cuda_runtime", &cuda_runtime, "Version of the CUDA runtime in csrc/cuda's part; 0 without.");
  m.def("cuda_architectures", &cuda_architectures, "Architectures that part is compiled for.");
}
