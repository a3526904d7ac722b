// The sigmoid kernel: loss and gradient of a tile of negatives in one evaluation, no statistics.
#pragma once

#include "softmax.h"

namespace fastcl {
namespace FASTCL_ISA {

template <class T, bool kLoss, bool kGradient>
void patch_sigmoid(const Tile<T>& strip, std::int64_t i0, std::int64_t n, T* row_loss,
                   const T* row_weight, GradientSums<T> sums) {
  using V = typename Simd<T>::V;
  constexpr int width = Simd<T>::width;
  for (std::int64_t r = 0; r < n; ++r) {
    const std::int64_t i = i0 + r;
    const RowOf<T> row = row_of(strip, i);
    const T weight = row_weight ? row_weight[i] : T(1);
    V loss = {}, gs = {}, g_sum = {};
    for (std::int64_t j = 0; j < strip.cols; j += width) {
      V s;
      const V l = logits(strip, row, j, s);
      const V e = exp(l > V{} ? -l : l);  // e^-|l|: in (0, 1], so that log1p is exact however small
      if (kLoss) loss += max(l, V{}) + log1p(e);
      if (kGradient) {
        const V g = (l > V{} ? V{} + T(1) : e) / (e + T(1)) * weight;
        gs += g * s;
        g_sum += g;
        if (sums.col_g) store(sums.col_g + j, load<V>(sums.col_g + j) + g);
        store_first(const_cast<T*>(row.s) + j, flushed(g * row.scale), strip.cols - j);
      }
    }
    if (kLoss) row_loss[i] += horizontal_sum<T>(loss);
    if (kGradient && sums.row_gs) sums.row_gs[i] += horizontal_sum<T>(gs);
    if (kGradient && sums.row_g) sums.row_g[i] += horizontal_sum<T>(g_sum);
  }
}

template <class T>
void sigmoid(const Tile<T>& tile, T* row_loss, const T* row_weight, bool gradient,
             GradientSums<T> sums, int threads) {
  for_each_patch(tile, sums, threads,
                 [&](const Tile<T>& strip, std::int64_t, std::int64_t i, std::int64_t n,
                     GradientSums<T> here) {
                   if (row_loss && gradient)
                     patch_sigmoid<T, true, true>(strip, i, n, row_loss, row_weight, here);
                   else if (gradient)
                     patch_sigmoid<T, false, true>(strip, i, n, row_loss, row_weight, here);
                   else
                     patch_sigmoid<T, true, false>(strip, i, n, row_loss, row_weight, here);
                 });
}

}  // namespace FASTCL_ISA
}  // namespace fastcl
