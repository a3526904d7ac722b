#include "amx.h"

#ifdef FASTCL_AMX

#include <immintrin.h>

#include <cstring>

#define FASTCL_ISA amx_threads
#include "parallel.h"

namespace fastcl {
namespace amx {
namespace {

constexpr std::int64_t kLines = 16;   // lines of a tile
constexpr std::int64_t kInner = 32;   // bfloat16 of a tile along k
constexpr std::int64_t kTileBytes = 1024;

inline std::int64_t blocks_of(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }
inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

inline char* tile_at(void* packed, std::int64_t line_block, std::int64_t k_block,
                     std::int64_t k_blocks) {
  return static_cast<char*>(packed) + (line_block * k_blocks + k_block) * kTileBytes;
}
inline const char* tile_at(const void* packed, std::int64_t line_block, std::int64_t k_block,
                           std::int64_t k_blocks) {
  return static_cast<const char*>(packed) + (line_block * k_blocks + k_block) * kTileBytes;
}

// Transposes 16 x 16 words in four rounds of exchanges between lines 1, 2, 4 and 8 apart.
inline void transpose_words(__m512i t[16]) {
  __m512i s[16];
  for (int i = 0; i < 8; ++i) {
    s[2 * i] = _mm512_unpacklo_epi32(t[2 * i], t[2 * i + 1]);
    s[2 * i + 1] = _mm512_unpackhi_epi32(t[2 * i], t[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    t[4 * i] = _mm512_unpacklo_epi64(s[4 * i], s[4 * i + 2]);
    t[4 * i + 1] = _mm512_unpackhi_epi64(s[4 * i], s[4 * i + 2]);
    t[4 * i + 2] = _mm512_unpacklo_epi64(s[4 * i + 1], s[4 * i + 3]);
    t[4 * i + 3] = _mm512_unpackhi_epi64(s[4 * i + 1], s[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    s[i] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
    s[i + 4] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    s[i + 8] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    s[i + 12] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd);
    t[i + 4] = _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0xdd);
  }
}

inline void store_tile(char* to, const __m512i t[16]) {
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 64 * i, t[i]);
}

// The 32 bfloat16 of row i from column j on; zeros outside the matrix.
inline __m512i load_row(const std::uint16_t* x, std::int64_t rows, std::int64_t cols,
                        std::int64_t ld, std::int64_t i, std::int64_t j) {
  const std::int64_t left = i < rows ? smaller(kInner, cols - j) : 0;
  if (left <= 0) return _mm512_setzero_si512();
  const __mmask32 mask = left == kInner ? ~0u : (1u << left) - 1;
  return _mm512_maskz_loadu_epi16(mask, x + i * ld + j);
}

// The 16 bfloat16 of row i from column j on, in the low half.
inline __m256i load_half_row(const std::uint16_t* x, std::int64_t rows, std::int64_t cols,
                             std::int64_t ld, std::int64_t i, std::int64_t j) {
  const std::int64_t left = i < rows ? smaller(kLines, cols - j) : 0;
  if (left <= 0) return _mm256_setzero_si256();
  const __mmask16 mask = static_cast<__mmask16>(left == kLines ? 0xffff : (1u << left) - 1);
  return _mm256_maskz_loadu_epi16(mask, x + i * ld + j);
}

// The 16 float32 of row i from column j on; zeros outside the matrix.
inline __m512 load_floats(const float* x, std::int64_t rows, std::int64_t cols, std::int64_t ld,
                          std::int64_t i, std::int64_t j) {
  const std::int64_t left = i < rows ? smaller(kLines, cols - j) : 0;
  if (left <= 0) return _mm512_setzero_ps();
  const __mmask16 mask = static_cast<__mmask16>(left == kLines ? 0xffff : (1u << left) - 1);
  return _mm512_maskz_loadu_ps(mask, x + i * ld + j);
}

// Words (low_c, high_c) of two half rows of bfloat16.
inline __m512i interleave(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline __m512 widened(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// ---- multiplication -----------------------------------------------------------------------

// The tile instructions are opaque to the compiler, which does not know that they read and write
// memory: what they touch must be in memory before, and be read again after.
inline void memory_fence() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {};
  std::uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; ++i) bytes_per_row[i] = 64, rows[i] = 16;
  }
};

// out [32, 32] = or += two line blocks of left times two of right: tiles 0-3 accumulate.
inline void multiply_block(const char* left0, const char* left1, const char* right0,
                           const char* right1, std::int64_t k_blocks, float* out, std::int64_t ld,
                           bool accumulate) {
  const std::int64_t stride = ld * static_cast<std::int64_t>(sizeof(float));
  if (accumulate) {
    _tile_loadd(0, out, stride);
    _tile_loadd(1, out + 16, stride);
    _tile_loadd(2, out + 16 * ld, stride);
    _tile_loadd(3, out + 16 * ld + 16, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (std::int64_t b = 0; b < k_blocks; ++b) {
    const std::int64_t at = b * kTileBytes;
    _tile_loadd(4, left0 + at, 64);
    _tile_loadd(6, right0 + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right1 + at, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left1 + at, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, stride);
  _tile_stored(1, out + 16, stride);
  _tile_stored(2, out + 16 * ld, stride);
  _tile_stored(3, out + 16 * ld + 16, stride);
}

constexpr std::int64_t kEdge = 32;         // rows and columns of one block of the result
constexpr std::int64_t kRowsOfTask = 256;  // rows of one parallel task

}  // namespace

std::int64_t packed_bytes(std::int64_t lines, std::int64_t k) {
  // Result blocks are two line blocks high and wide, so line blocks come in pairs.
  return 2 * blocks_of(lines, 2 * kLines) * blocks_of(k, kInner) * kTileBytes;
}

void pack(const std::uint16_t* x, std::int64_t rows, std::int64_t cols, std::int64_t ld, Form form,
          void* packed, int threads) {
  const bool by_rows = form != Form::right;
  const std::int64_t lines = by_rows ? rows : cols, k = by_rows ? cols : rows;
  const std::int64_t line_blocks = 2 * blocks_of(lines, 2 * kLines), k_blocks = blocks_of(k, kInner);
  amx_threads::for_each_block(line_blocks, threads, [&](std::int64_t block) {
    __m512i t[16];
    for (std::int64_t b = 0; b < k_blocks; ++b) {
      if (by_rows) {
        for (int i = 0; i < 16; ++i)
          t[i] = load_row(x, rows, cols, ld, block * kLines + i, b * kInner);
        if (form == Form::right_of_transpose) transpose_words(t);
      } else {
        for (int w = 0; w < 16; ++w) {
          const std::int64_t row = b * kInner + 2 * w;
          t[w] = interleave(load_half_row(x, rows, cols, ld, row, block * kLines),
                            load_half_row(x, rows, cols, ld, row + 1, block * kLines));
        }
      }
      store_tile(tile_at(packed, block, b, k_blocks), t);
    }
  });
}

void pack_split(const float* x, std::int64_t rows, std::int64_t cols, std::int64_t ld,
                void* packed, void* transposed, int threads) {
  // Step over 32 x 32 blocks: two tiles of each result. Padding up to 32 is written as zeros.
  const std::int64_t row_steps = blocks_of(rows, 32), col_steps = blocks_of(cols, 32);
  const std::int64_t bytes[2] = {packed_bytes(rows, cols), packed_bytes(cols, rows)};
  amx_threads::for_each_block(row_steps, threads, [&](std::int64_t r) {
    for (std::int64_t c = 0; c < col_steps; ++c) {
      __m256i half[2][32][2];  // high and low; rows; two halves of 16 columns
      for (int i = 0; i < 32; ++i)
        for (int h = 0; h < 2; ++h) {
          const __m512 value = load_floats(x, rows, cols, ld, 32 * r + i, 32 * c + 16 * h);
          half[0][i][h] = rounded(value);
          half[1][i][h] = rounded(_mm512_sub_ps(value, widened(half[0][i][h])));
        }
      __m512i t[16];
      for (int part = 0; part < 2; ++part) {
        const auto& rows_of = half[part];
        for (int h = 0; packed && h < 2; ++h) {
          for (int i = 0; i < 16; ++i)
            t[i] = _mm512_inserti64x4(_mm512_castsi256_si512(rows_of[16 * h + i][0]),
                                      rows_of[16 * h + i][1], 1);
          store_tile(tile_at(packed, 2 * r + h, c, col_steps) + part * bytes[0], t);
        }
        for (int h = 0; transposed && h < 2; ++h) {
          for (int w = 0; w < 16; ++w) t[w] = interleave(rows_of[2 * w][h], rows_of[2 * w + 1][h]);
          transpose_words(t);
          store_tile(tile_at(transposed, 2 * c + h, r, row_steps) + part * bytes[1], t);
        }
      }
    }
  });
}

void multiply(const void* left, const void* right, std::int64_t m, std::int64_t n, std::int64_t k,
              float* out, std::int64_t ld, bool accumulate, int threads) {
  const std::int64_t k_blocks = blocks_of(k, kInner);
  const std::int64_t tasks_down = blocks_of(m, kRowsOfTask), tasks_across = blocks_of(n, kEdge);
  amx_threads::for_each_block(tasks_down * tasks_across, threads, [&](std::int64_t task) {
    const TileConfig config;
    memory_fence();
    _tile_loadconfig(&config);
    alignas(64) float edge[kEdge * kEdge];
    const std::int64_t j = (task % tasks_across) * kEdge, cols = smaller(kEdge, n - j);
    const std::int64_t first = (task / tasks_across) * kRowsOfTask;
    const std::int64_t last = smaller(m, first + kRowsOfTask);
    const char* const right0 = tile_at(right, j / kLines, 0, k_blocks);
    const char* const right1 = tile_at(right, j / kLines + 1, 0, k_blocks);
    for (std::int64_t i = first; i < last; i += kEdge) {
      const char* const left0 = tile_at(left, i / kLines, 0, k_blocks);
      const char* const left1 = tile_at(left, i / kLines + 1, 0, k_blocks);
      const std::int64_t rows = smaller(kEdge, m - i);
      float* const target = out + i * ld + j;
      if (rows == kEdge && cols == kEdge) {
        multiply_block(left0, left1, right0, right1, k_blocks, target, ld, accumulate);
        continue;
      }
      const std::size_t bytes = static_cast<std::size_t>(cols) * sizeof(float);
      if (accumulate)
        for (std::int64_t r = 0; r < rows; ++r) std::memcpy(edge + r * kEdge, target + r * ld, bytes);
      memory_fence();
      multiply_block(left0, left1, right0, right1, k_blocks, edge, kEdge, accumulate);
      memory_fence();
      for (std::int64_t r = 0; r < rows; ++r) std::memcpy(target + r * ld, edge + r * kEdge, bytes);
    }
    _tile_release();
  });
}

}  // namespace amx
}  // namespace fastcl

#else  // no compiler support

namespace fastcl {
namespace amx {
std::int64_t packed_bytes(std::int64_t, std::int64_t) { return 0; }
void pack(const std::uint16_t*, std::int64_t, std::int64_t, std::int64_t, Form, void*, int) {}
void pack_split(const float*, std::int64_t, std::int64_t, std::int64_t, void*, void*, int) {}
void multiply(const void*, const void*, std::int64_t, std::int64_t, std::int64_t, float*,
              std::int64_t, bool, int) {}
}  // namespace amx
}  // namespace fastcl

#endif
