// What a CPU kernel works on: one tile of the similarity matrix, and the table of kernels.
//
// A tile is a block of raw similarities s_ij = <u_i, v_j>, as a matrix product left it. A kernel
// reads it once, as logits:
//     l_ij = scale_i s_ij + row_bias_i + col_bias_j,   -inf where the pair is dropped,
// and turns it into statistics, or in place into the gradient with respect to s.
#pragma once

#include <cstdint>
#include <limits>

namespace fastcl {

// Column of the first row's dropped pair when there is no dropped diagonal.
constexpr std::int64_t kNoDiagonal = std::numeric_limits<std::int64_t>::min();

// An element type's companion for ids: integers of the same width, so that masks line up.
template <class T> struct IdOf;
template <> struct IdOf<float> { using type = std::int32_t; };
template <> struct IdOf<double> { using type = std::int64_t; };

template <class T>
struct Tile {
  using Id = typename IdOf<T>::type;
  T* s;                        // [rows, cols], row stride ld; gradients overwrite it
  std::int64_t rows, cols, ld;
  const T* scale;              // one per row, or stride 0
  std::int64_t scale_stride;
  const T* row_bias;           // nullptr: none
  std::int64_t row_bias_stride;
  const T* col_bias;           // nullptr: none
  const Id* row_ids;           // nullptr: none; pairs with equal ids are dropped
  const Id* col_ids;
  std::int64_t diagonal;       // pair (i, i + diagonal) is dropped; kNoDiagonal: none
  T* diagonal_s;               // nullptr, or where the dropped pairs' s and l go, one per row
  T* diagonal_l;
};

// A running logsumexp per line: value = max + log(sum). nullptr: not wanted.
// The two parts stay apart, as their sum would round away what a small loss consists of.
template <class T>
struct Running {
  T* max;
  T* sum;
};

// One side of G_ij = sum over the sides of weight * e^(l_ij - max), with max at least every l of the
// line and weight its gradient divided by sum. weight nullptr: side not wanted.
template <class T>
struct Side {
  const T* max;
  const T* weight;
};

// Line sums of a gradient tile, each added to what is there. nullptr: not wanted.
template <class T>
struct GradientSums {
  T* row_gs;  // sum_j G_ij s_ij, for the gradient of the scale
  T* row_g;   // sum_j G_ij, for the gradient of the row bias
  T* col_g;   // sum_i G_ij, for the gradient of the column bias
};

// The kernels of one instruction set. Every result is the same for any number of threads.
template <class T>
struct Kernels {
  // Adds the tile to the running logsumexp of its rows, of its columns, or of both.
  void (*softmax_statistics)(const Tile<T>&, Running<T> rows, Running<T> cols, int threads);
  // s <- scale_i G_ij.
  void (*softmax_gradient)(const Tile<T>&, Side<T> rows, Side<T> cols, GradientSums<T>,
                           int threads);
  // Online softmax: s <- e^(l - new max); updates rows, and row_es (sum_j e^(l - max) s_ij);
  // rescale_i <- e^(old max - new max), by which what was accumulated before must be multiplied.
  void (*softmax_online)(const Tile<T>&, Running<T> rows, T* row_es, T* rescale, int threads);
  // row_loss_i += sum_j softplus(l_ij). With a gradient wanted also s <- scale_i weight_i sigmoid(l_ij).
  void (*sigmoid)(const Tile<T>&, T* row_loss, const T* row_weight, bool gradient, GradientSums<T>,
                  int threads);
};

// The best kernels this processor can run (or those named by FASTCL_CPU_ISA), and their name.
const char* isa_name();
template <class T> const Kernels<T>& kernels();

}  // namespace fastcl
