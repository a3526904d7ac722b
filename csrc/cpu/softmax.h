// The softmax kernels: statistics of a tile, its gradient, and the online form of both.
//
// Work goes by patches of kPatchRows x kPatchCols, small enough for the first-level cache, so that
// rows and columns are served from one evaluation of e^x wherever a common reference point is safe:
// with ref at most kWindow above every maximum involved, what e^(l - ref) loses to underflow is
// below e^-46 of every sum it belongs to. Elsewhere (tiny temperatures, empty lines, NaN) rows and
// columns take an exponential each.
#pragma once

#include "logits.h"
#include "parallel.h"

namespace fastcl {
namespace FASTCL_ISA {

constexpr std::int64_t kBlockRows = 32;  // at most, of one parallel task
constexpr std::int64_t kPatchCols = 512;
template <class T> inline constexpr T kWindow = T(42);

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t blocks_of(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }
// Rows of one parallel task: fewer where a tile has few, so that many threads find work in it. Each
// block has column sums of its own, which are added up at the end.
inline std::int64_t block_rows(std::int64_t rows) {
  return smaller(kBlockRows, blocks_of(rows, 32 * kPatchRows) * kPatchRows);
}
template <class T> inline std::int64_t padded(std::int64_t n) {
  return blocks_of(n, Simd<T>::width) * Simd<T>::width;
}

// A tile narrowed to the columns from j0 on, so that patches index from 0.
template <class T>
inline Tile<T> strip_of(Tile<T> tile, std::int64_t j0) {
  tile.cols = smaller(kPatchCols, tile.cols - j0);
  tile.s += j0;
  if (tile.col_bias) tile.col_bias += j0;
  if (tile.col_ids) tile.col_ids += j0;
  if (tile.diagonal != kNoDiagonal) tile.diagonal -= j0;
  return tile;
}

// ---- statistics ---------------------------------------------------------------------------

// Adds one patch to the running logsumexps of its rows [i0, i0 + n) and of its columns.
// cols.max and cols.sum are padded; lanes past the last column start at +inf and are never read.
template <class T, bool kRows, bool kCols>
void patch_statistics(const Tile<T>& strip, std::int64_t i0, std::int64_t n, Running<T> rows,
                      Running<T> cols) {
  using V = typename Simd<T>::V;
  constexpr int width = Simd<T>::width;
  alignas(64) T l[kPatchRows][kPatchCols];
  alignas(64) T col_max[kPatchCols];
  T row_max[kPatchRows];
  const std::int64_t end = padded<T>(strip.cols);

  if (kCols) for (std::int64_t j = 0; j < end; j += width) store(col_max + j, load<V>(cols.max + j));
  T top = kMinusInfinity<T>, lowest = T(__builtin_huge_val());
  for (std::int64_t r = 0; r < n; ++r) {
    const RowOf<T> row = row_of(strip, i0 + r);
    V s, highest = V{} + kMinusInfinity<T>;
    for (std::int64_t j = 0; j < end; j += width) {
      const V x = logits(strip, row, j, s);
      store(l[r] + j, x);
      highest = max(x, highest);
      if (kCols) store(col_max + j, max(x, load<V>(col_max + j)));
    }
    const T here = horizontal_max<T>(highest);
    top = here > top ? here : top;
    if (kRows) {
      row_max[r] = here > rows.max[i0 + r] ? here : rows.max[i0 + r];
      lowest = row_max[r] < lowest ? row_max[r] : lowest;
    }
  }

  bool shared = false;  // one e^x serves both directions
  if (kRows && kCols) {
    V low = V{} + lowest;
    for (std::int64_t j = 0; j < end; j += width) {
      const V m = load<V>(col_max + j);
      low = m < low ? m : low;
    }
    lowest = -horizontal_max<T>(-low);
    shared = top > kMinusInfinity<T> && top - lowest <= kWindow<T>;
  }

  V row_sum[kPatchRows] = {};
  T row_ref[kPatchRows];
  if (kRows)
    for (std::int64_t r = 0; r < n; ++r) row_ref[r] = shared ? top : finite_or_zero(row_max[r]);

  if (kRows && !shared)
    for (std::int64_t r = 0; r < n; ++r)
      for (std::int64_t j = 0; j < end; j += width)
        row_sum[r] += exp(load<V>(l[r] + j) - row_ref[r]);

  if (kCols)
    for (std::int64_t j = 0; j < end; j += width) {
      const V m = load<V>(col_max + j), ref = finite_or_zero_lanes<T>(m);
      V sum = {};
      if (shared) {
        for (std::int64_t r = 0; r < n; ++r) {
          const V e = exp(load<V>(l[r] + j) - top);
          sum += e;
          row_sum[r] += e;
        }
        sum *= exp(top - m);
      } else {
        for (std::int64_t r = 0; r < n; ++r) sum += exp(load<V>(l[r] + j) - ref);
      }
      store(cols.sum + j, load<V>(cols.sum + j) * exp(load<V>(cols.max + j) - ref) + sum);
      store(cols.max + j, m);
    }

  if (kRows)
    for (std::int64_t r = 0; r < n; ++r) {
      const std::int64_t i = i0 + r;
      const T ref = finite_or_zero(row_max[r]);
      rows.sum[i] = rows.sum[i] * exp(rows.max[i] - ref) +
                    horizontal_sum<T>(row_sum[r]) * exp(row_ref[r] - ref);
      rows.max[i] = row_max[r];
    }
}

template <class T, bool kRows, bool kCols>
void statistics(const Tile<T>& tile, Running<T> rows, Running<T> cols, int threads) {
  using V = typename Simd<T>::V;
  constexpr int width = Simd<T>::width;
  const std::int64_t block = block_rows(tile.rows), blocks = blocks_of(tile.rows, block);
  const std::int64_t line = padded<T>(tile.cols);
  Scratch scratch(kCols ? static_cast<std::size_t>(2 * blocks * line) * sizeof(T) : 0);
  T* partial = scratch.as<T>();  // for each block of rows: maxima, then sums, of all columns

  for_each_block(blocks, threads, [&](std::int64_t b) {
    T* const maxima = kCols ? partial + 2 * b * line : nullptr;
    T* const sums = kCols ? maxima + line : nullptr;
    if (kCols)
      for (std::int64_t j = 0; j < line; ++j) {
        maxima[j] = j < tile.cols ? kMinusInfinity<T> : -kMinusInfinity<T>;
        sums[j] = T(0);
      }
    const std::int64_t end = smaller(tile.rows, (b + 1) * block);
    for (std::int64_t j0 = 0; j0 < tile.cols; j0 += kPatchCols) {
      const Tile<T> strip = strip_of(tile, j0);
      const Running<T> of_strip = {kCols ? maxima + j0 : nullptr, kCols ? sums + j0 : nullptr};
      for (std::int64_t i = b * block; i < end; i += kPatchRows)
        patch_statistics<T, kRows, kCols>(strip, i, smaller(kPatchRows, end - i), rows, of_strip);
    }
  });
  if (!kCols) return;

  for_each_block(blocks_of(tile.cols, kPatchCols), threads, [&](std::int64_t c) {
    const std::int64_t end = smaller(tile.cols, (c + 1) * kPatchCols);
    for (std::int64_t j = c * kPatchCols; j < end; j += width) {
      const std::int64_t left = tile.cols - j;
      V m = load_first<V>(cols.max + j, left), sum = load_first<V>(cols.sum + j, left);
      for (std::int64_t b = 0; b < blocks; ++b) {
        const V other = load<V>(partial + 2 * b * line + j);
        const V new_max = max(other, m), ref = finite_or_zero_lanes<T>(new_max);
        sum = sum * exp(m - ref) + load<V>(partial + (2 * b + 1) * line + j) * exp(other - ref);
        m = new_max;
      }
      store_first(cols.max + j, m, left);
      store_first(cols.sum + j, sum, left);
    }
  });
}

template <class T>
void softmax_statistics(const Tile<T>& tile, Running<T> rows, Running<T> cols, int threads) {
  if (rows.max && cols.max) return statistics<T, true, true>(tile, rows, cols, threads);
  if (rows.max) return statistics<T, true, false>(tile, rows, cols, threads);
  if (cols.max) return statistics<T, false, true>(tile, rows, cols, threads);
}

// ---- gradient -----------------------------------------------------------------------------

template <class T, bool kRows, bool kCols>
void patch_gradient(const Tile<T>& strip, std::int64_t i0, std::int64_t n, Side<T> rows,
                    Side<T> cols, GradientSums<T> sums) {
  using V = typename Simd<T>::V;
  constexpr int width = Simd<T>::width;
  const std::int64_t end = padded<T>(strip.cols);
  // Where one e^x serves both sides: G = e^(l - top) (row_factor_i + col_factor_j).
  alignas(64) T col_factor[kPatchCols];
  bool shared = false;
  T top = kMinusInfinity<T>;
  if (kRows && kCols) {
    T lowest = T(__builtin_huge_val());
    for (std::int64_t r = 0; r < n; ++r) {
      const T x = rows.max[i0 + r];
      top = x > top ? x : top;
      lowest = x < lowest ? x : lowest;
    }
    bool in_window = true;
    for (std::int64_t j = 0; j < strip.cols; ++j) in_window &= top - cols.max[j] <= kWindow<T>;
    shared = in_window && top - lowest <= kWindow<T>;
    if (shared)
      for (std::int64_t j = 0; j < end; j += width) {
        const std::int64_t left = strip.cols - j;
        V m = load_first<V>(cols.max + j, left);
        for (std::int64_t k = left; k < width; ++k) m[k] = top;  // past the last column
        store(col_factor + j, load_first<V>(cols.weight + j, left) * exp(top - m));
      }
  }

  for (std::int64_t r = 0; r < n; ++r) {
    const std::int64_t i = i0 + r;
    const RowOf<T> row = row_of(strip, i);
    const T row_ref = kRows ? finite_or_zero(rows.max[i]) : T(0);
    const T row_weight = kRows ? rows.weight[i] : T(0);
    const T row_factor = shared ? row_weight * exp(top - row_ref) : T(0);
    // The maxima are of tiles that were made before; of this one, a last bit may differ, and at
    // logits of 1e9 that is more than e^x can take.
    const auto exp_below = [](V x) { return exp(x > V{} ? V{} : x); };
    V gs = {}, g_sum = {};
    for (std::int64_t j = 0; j < end; j += width) {
      const std::int64_t left = strip.cols - j;
      V s, g = {};
      const V l = logits(strip, row, j, s);
      if (kRows && kCols && shared) {
        g = exp_below(l - top) * (load<V>(col_factor + j) + row_factor);
      } else {
        if (kRows) g = exp_below(l - row_ref) * row_weight;
        if (kCols)
          g += exp_below(l - finite_or_zero_lanes<T>(load_first<V>(cols.max + j, left))) *
               load_first<V>(cols.weight + j, left);
      }
      gs += g * s;
      g_sum += g;
      if (sums.col_g) store(sums.col_g + j, load<V>(sums.col_g + j) + g);
      store_first(const_cast<T*>(row.s) + j, flushed(g * row.scale), left);
    }
    if (sums.row_gs) sums.row_gs[i] += horizontal_sum<T>(gs);
    if (sums.row_g) sums.row_g[i] += horizontal_sum<T>(g_sum);
  }
}

// Runs body(strip, first row, rows, sums of the strip) over a tile, and adds up the column sums of
// its blocks of rows in their order.
template <class T, class Body>
void for_each_patch(const Tile<T>& tile, GradientSums<T> sums, int threads, const Body& body) {
  const std::int64_t block = block_rows(tile.rows), blocks = blocks_of(tile.rows, block);
  const std::int64_t line = padded<T>(tile.cols);
  Scratch scratch(sums.col_g ? static_cast<std::size_t>(blocks * line) * sizeof(T) : 0);
  T* partial = scratch.as<T>();
  for_each_block(blocks, threads, [&](std::int64_t b) {
    T* const col_g = sums.col_g ? partial + b * line : nullptr;
    if (col_g) for (std::int64_t j = 0; j < line; ++j) col_g[j] = T(0);
    const std::int64_t end = smaller(tile.rows, (b + 1) * block);
    for (std::int64_t j0 = 0; j0 < tile.cols; j0 += kPatchCols) {
      const Tile<T> strip = strip_of(tile, j0);
      const GradientSums<T> here = {sums.row_gs, sums.row_g, col_g ? col_g + j0 : nullptr};
      for (std::int64_t i = b * block; i < end; i += kPatchRows)
        body(strip, j0, i, smaller(kPatchRows, end - i), here);
    }
  });
  if (!sums.col_g) return;
  for_each_block(blocks_of(tile.cols, kPatchCols), threads, [&](std::int64_t c) {
    const std::int64_t end = smaller(tile.cols, (c + 1) * kPatchCols);
    for (std::int64_t j = c * kPatchCols; j < end; ++j)
      for (std::int64_t b = 0; b < blocks; ++b) sums.col_g[j] += partial[b * line + j];
  });
}

template <class T, bool kRows, bool kCols>
void gradient(const Tile<T>& tile, Side<T> rows, Side<T> cols, GradientSums<T> sums, int threads) {
  for_each_patch(tile, sums, threads,
                 [&](const Tile<T>& strip, std::int64_t j0, std::int64_t i, std::int64_t n,
                     GradientSums<T> here) {
                   const Side<T> of_strip = {kCols ? cols.max + j0 : nullptr,
                                             kCols ? cols.weight + j0 : nullptr};
                   patch_gradient<T, kRows, kCols>(strip, i, n, rows, of_strip, here);
                 });
}

template <class T>
void softmax_gradient(const Tile<T>& tile, Side<T> rows, Side<T> cols, GradientSums<T> sums,
                      int threads) {
  if (rows.weight && cols.weight) return gradient<T, true, true>(tile, rows, cols, sums, threads);
  if (rows.weight) return gradient<T, true, false>(tile, rows, cols, sums, threads);
  if (cols.weight) return gradient<T, false, true>(tile, rows, cols, sums, threads);
}

// ---- online -------------------------------------------------------------------------------

template <class T>
void softmax_online(const Tile<T>& tile, Running<T> rows, T* row_es, T* rescale, int threads) {
  using V = typename Simd<T>::V;
  constexpr int width = Simd<T>::width;
  for_each_block(blocks_of(tile.rows, kPatchRows), threads, [&](std::int64_t b) {
    const std::int64_t end = smaller(tile.rows, (b + 1) * kPatchRows);
    for (std::int64_t i = b * kPatchRows; i < end; ++i) {
      const RowOf<T> row = row_of(tile, i);
      V s, highest = V{} + rows.max[i];
      for (std::int64_t j = 0; j < tile.cols; j += width)
        highest = max(logits(tile, row, j, s), highest);
      const T new_max = horizontal_max<T>(highest), ref = finite_or_zero(new_max);
      V sum = {}, es = {};
      for (std::int64_t j = 0; j < tile.cols; j += width) {
        const V e = exp(logits(tile, row, j, s) - ref);
        sum += e;
        es += e * s;
        store_first(const_cast<T*>(row.s) + j, flushed(e), tile.cols - j);
      }
      rescale[i] = exp(rows.max[i] - ref);
      rows.sum[i] = rows.sum[i] * rescale[i] + horizontal_sum<T>(sum);
      row_es[i] = row_es[i] * rescale[i] + horizontal_sum<T>(es);
      rows.max[i] = new_max;
    }
  });
}

}  // namespace FASTCL_ISA
}  // namespace fastcl
