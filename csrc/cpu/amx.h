// bfloat16 matrix products with float32 accumulators on AMX, for matrices packed into its tiles.
//
// A tile is 1 KiB: 16 lines of 16 words, a word being two neighbouring bfloat16 along the inner
// dimension k. The processor multiplies
//     left   16 rows  x 32 k:  line r, word w = (x[r][2w], x[r][2w + 1])
//     right  32 k  x 16 cols:  line w, word c = (x[2w][c], x[2w + 1][c])
// so a right tile of X^T is the word-transpose of a left tile of X, and the other way round.
// A packed matrix is its tiles in order [line block][k block], padded with zeros.
#pragma once

#include <cstdint>

namespace fastcl {
namespace amx {

// True where the processor has the instructions and the kernel grants their registers.
bool available();

// Bytes of a packed matrix of `lines` (rows of a left one, columns of a right one) x k.
std::int64_t packed_bytes(std::int64_t lines, std::int64_t k);

enum class Form {
  left,         // X as the left factor:                    lines = rows, k = cols
  right_of_transpose,  // X^T as the right factor:          lines = rows, k = cols
  right         // X as the right factor:                   lines = cols, k = rows
};

// Packs bfloat16 X [rows, cols], row stride ld elements.
void pack(const std::uint16_t* x, std::int64_t rows, std::int64_t cols, std::int64_t ld, Form form,
          void* packed, int threads);

// Splits float32 X [rows, cols] into two bfloat16 matrices, high + low, 16 bits of mantissa in all,
// and packs them as left factors, high then low (packed, or nullptr); the same of the transpose
// (transposed, or nullptr). Each pair takes twice packed_bytes.
void pack_split(const float* x, std::int64_t rows, std::int64_t cols, std::int64_t ld,
                void* packed, void* transposed, int threads);

// out [m, n], row stride ld, = (or with accumulate +=) left [m, k] times right [k, n].
void multiply(const void* left, const void* right, std::int64_t m, std::int64_t n, std::int64_t k,
              float* out, std::int64_t ld, bool accumulate, int threads);

}  // namespace amx
}  // namespace fastcl
