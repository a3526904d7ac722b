// From raw similarities to logits, a vector at a time.
#pragma once

#include "simd.h"
#include "tile.h"

namespace fastcl {
namespace FASTCL_ISA {

constexpr std::int64_t kPatchRows = 8;

// What is constant along one row of a tile.
template <class T>
struct RowOf {
  const T* s;
  T scale, bias;
  typename IdOf<T>::type id;
  std::int64_t dropped;             // column of the dropped pair; may lie outside the tile
  T* diagonal_s;                    // where its s and l go, or nullptr
  T* diagonal_l;
  bool plain;                       // nothing but scale and row bias makes its logits
};

template <class T>
inline RowOf<T> row_of(const Tile<T>& tile, std::int64_t i) {
  RowOf<T> row;
  row.s = tile.s + i * tile.ld;
  row.scale = tile.scale[i * tile.scale_stride];
  row.bias = tile.row_bias ? tile.row_bias[i * tile.row_bias_stride] : T(0);
  row.id = tile.row_ids ? tile.row_ids[i] : 0;
  row.dropped = tile.diagonal == kNoDiagonal ? -1 : i + tile.diagonal;
  row.diagonal_s = tile.diagonal_s ? tile.diagonal_s + i : nullptr;
  row.diagonal_l = tile.diagonal_l ? tile.diagonal_l + i : nullptr;
  row.plain = !tile.col_bias && !tile.col_ids && tile.cols % Simd<T>::width == 0 &&
              !(row.dropped >= 0 && row.dropped < tile.cols);
  return row;
}

// l for the columns j .. j + width; -inf at dropped pairs and past the last column.
// `s` receives the raw similarities (0 past the last column).
template <class T>
inline typename Simd<T>::V logits(const Tile<T>& tile, const RowOf<T>& row, std::int64_t j,
                                  typename Simd<T>::V& s) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  constexpr int width = Simd<T>::width;
  // The rows of a tile are far apart, and each begins on another page, where the hardware has yet to
  // see a stream: what the next patch reads is fetched while this one is computed.
  __builtin_prefetch(row.s + kPatchRows * tile.ld + j);
  if (__builtin_expect(row.plain, 1)) {
    s = load<V>(row.s + j);
    return s * row.scale + row.bias;
  }
  const std::int64_t left = tile.cols - j;
  s = load_first<V>(row.s + j, left);
  V l = s * row.scale + row.bias;
  if (tile.col_bias) l += load_first<V>(tile.col_bias + j, left);
  const bool has_dropped = row.dropped >= j && row.dropped < j + width && row.dropped < tile.cols;
  if (__builtin_expect(has_dropped, 0)) {
    if (row.diagonal_s) *row.diagonal_s = s[row.dropped - j];
    if (row.diagonal_l) *row.diagonal_l = l[row.dropped - j];
    l[row.dropped - j] = kMinusInfinity<T>;
  }
  if (tile.col_ids) {
    const I same = load_first<I>(tile.col_ids + j, left) == row.id;
    l = same ? V{} + kMinusInfinity<T> : l;
  }
  if (__builtin_expect(left < width, 0))
    for (int k = static_cast<int>(left); k < width; ++k) l[k] = kMinusInfinity<T>;
  return l;
}

// -inf as the reference point of an empty line would make NaN of (-inf) - (-inf).
template <class T> inline T finite_or_zero(T m) { return m == kMinusInfinity<T> ? T(0) : m; }
template <class T>
inline typename Simd<T>::V finite_or_zero_lanes(typename Simd<T>::V m) {
  using V = typename Simd<T>::V;
  return m == (V{} + kMinusInfinity<T>) ? V{} : m;
}

}  // namespace FASTCL_ISA
}  // namespace fastcl
