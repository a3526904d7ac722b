// Vectors, and the three functions the losses need of them.
//
// One source for every instruction set: the compiler's vector extensions, at the width that the
// including file asks for (FASTCL_VECTOR_BYTES). No intrinsics, no standard library templates: a
// template shared with a file compiled for a lesser instruction set could be the one that is linked.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastcl {
namespace FASTCL_ISA {

template <class T> struct Simd;

template <> struct Simd<float> {
  typedef float V __attribute__((vector_size(FASTCL_VECTOR_BYTES)));
  typedef std::int32_t I __attribute__((vector_size(FASTCL_VECTOR_BYTES)));
  static constexpr int width = FASTCL_VECTOR_BYTES / 4;
};
template <> struct Simd<double> {
  typedef double V __attribute__((vector_size(FASTCL_VECTOR_BYTES)));
  typedef std::int64_t I __attribute__((vector_size(FASTCL_VECTOR_BYTES)));
  static constexpr int width = FASTCL_VECTOR_BYTES / 8;
};

template <class T> inline constexpr T kMinusInfinity = -T(__builtin_huge_val());

template <class V> inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }

// The first n lanes of a vector (n may exceed the width); the rest are zero.
template <class V, class E> inline V load_first(const E* p, std::int64_t n) {
  if (n * static_cast<std::int64_t>(sizeof(E)) >= static_cast<std::int64_t>(sizeof(V))) return load<V>(p);
  V v = {};
  std::memcpy(&v, p, static_cast<std::size_t>(n) * sizeof(E));
  return v;
}
template <class V, class E> inline void store_first(E* p, V v, std::int64_t n) {
  if (n * static_cast<std::int64_t>(sizeof(E)) >= static_cast<std::int64_t>(sizeof(V))) return store(p, v);
  std::memcpy(p, &v, static_cast<std::size_t>(n) * sizeof(E));
}

// x, or 0 where its magnitude is below 2^-110. A matrix product pays some hundred cycles for each
// subnormal number it meets or makes, and a converged model's G is full of them.
inline Simd<float>::V flushed(Simd<float>::V x) {
  using V = Simd<float>::V;
  const V magnitude = x < V{} ? -x : x;
  return magnitude < V{} + 0x1p-110f ? V{} : x;
}
inline Simd<double>::V flushed(Simd<double>::V x) { return x; }

// max(x, m) that drops a NaN in x: a NaN always reaches the sums that follow, and stays there.
template <class V> inline V max(V x, V m) { return x > m ? x : m; }

template <class T> inline T horizontal_max(typename Simd<T>::V v) {
  T m = v[0];
  for (int k = 1; k < Simd<T>::width; ++k) m = v[k] > m ? v[k] : m;
  return m;
}
template <class T> inline T horizontal_sum(typename Simd<T>::V v) {
  T lanes[Simd<T>::width];
  store(lanes, v);
  for (int step = Simd<T>::width / 2; step > 0; step /= 2)
    for (int k = 0; k < step; ++k) lanes[k] += lanes[k + step];
  return lanes[0];
}

// e^x for x <= 88; exactly 0 below -88 (so e^-inf = 0); NaN stays NaN.
// x = n log(2) + r with |r| <= log(2) / 2: e^r by a minimax polynomial (relative error 3e-9), 2^n by
// its bits. n log(2) is taken off in two parts, the first of so few bits that nothing is rounded.
inline Simd<float>::V exp(Simd<float>::V x) {
  using V = Simd<float>::V;
  using I = Simd<float>::I;
  const V lowest = V{} - 88.0f;
  x = x < lowest ? lowest : x;
  const V to_integer = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = x * 1.44269504f + to_integer;
  const V n = shifted - to_integer;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = V{} + 1.38143207e-3f;
  p = p * r + 8.36885107e-3f;
  p = p * r + 4.16684011e-2f;
  p = p * r + 1.66665195e-1f;
  p = p * r + 4.99999934e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const I bits = (I)shifted << 23;  // the integer sits in the low bits of the mantissa
  return p * (V)(bits + (127 << 23));
}

// log(1 + e) for e in [0, 1] (degree 9, relative error 5e-9): exact to the last bits however small e.
inline Simd<float>::V log1p(Simd<float>::V e) {
  using V = Simd<float>::V;
  V p = V{} - 0.0032440253597032682f;
  p = p * e + 0.019851465106643054f;
  p = p * e - 0.05695954357702793f;
  p = p * e + 0.10603656331491669f;
  p = p * e - 0.15305593798462908f;
  p = p * e + 0.19675939855978122f;
  p = p * e - 0.24954133822095248f;
  p = p * e + 0.33329962441086086f;
  p = p * e - 0.4999990242439025f;
  p = p * e + 0.9999999952875281f;
  return p * e;
}

// float64 is there so that gradients can be checked: exactness, not speed.
inline Simd<double>::V exp(Simd<double>::V x) {
  for (int k = 0; k < Simd<double>::width; ++k) x[k] = ::exp(x[k]);
  return x;
}
inline Simd<double>::V log1p(Simd<double>::V x) {
  for (int k = 0; k < Simd<double>::width; ++k) x[k] = ::log1p(x[k]);
  return x;
}
inline float exp(float x) { return exp(Simd<float>::V{} + x)[0]; }
inline double exp(double x) { return ::exp(x); }

}  // namespace FASTCL_ISA
}  // namespace fastcl
