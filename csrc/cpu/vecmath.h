// Elementary functions on vectors: within 2 ulp of the exact value, 3 for sigmoid and silu. The left tails of gelu and
// gelu_tanh, where the result is e to a large negative power, lose relative digits as that power grows, and never more
// than 2^-23 in absolute value. csrc/tests/test_mlp.cpp holds each function to its bound.
//
// A lane's result depends on that lane alone: tails are loaded with load_n and go through the same code, never through
// the scalar functions of libm, so a number gives the same bits at every position of every row.
//
// NaN comes out as NaN, also of max and min below: both give their second operand where one is NaN.
#pragma once

#include "simd.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {

// 2^n for whole n in -126 .. 127
FASTDIFF_INLINE Vec power_of_two(Vec n) { return as_float(shift_left<23>(to_int(n) + iset1(127))); }

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2. Below -104 it is 0, above 88.73 infinite; subnormal results are right.
FASTDIFF_INLINE Vec exp(Vec x) {
  x = min(set1(90.0f), max(set1(-105.0f), x));
  const Vec n = round(x * set1(1.44269504f));
  Vec r = fma(n, set1(-0.693359375f), x);  // ln 2 in two parts; n times the first is exact
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.39517186e-3f);
  p = fma(p, r, set1(8.36959854e-3f));
  p = fma(p, r, set1(4.16661873e-2f));
  p = fma(p, r, set1(1.66665122e-1f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r * r, r) + set1(1.0f);
  return scale(p, n);
}

FASTDIFF_INLINE Vec negate(Vec x) { return as_float(as_int(x) ^ iset1(0x80000000u)); }
FASTDIFF_INLINE Vec magnitude(Vec x) { return as_float(as_int(x) & iset1(0x7FFFFFFFu)); }
// `x` with the sign of `sign`; x >= 0
FASTDIFF_INLINE Vec with_sign(Vec x, Vec sign) { return as_float(as_int(x) | (as_int(sign) & iset1(0x80000000u))); }

// ln(x 2^-down) for positive normal x: x = 2^k m with m in [sqrt(1/2), sqrt(2)), f = m - 1.
template <int down = 0>
FASTDIFF_INLINE Vec log(Vec x) {
  const IVec lifted = as_int(x) + iset1(0x3F800000u - 0x3F3504F3u);  // a mantissa over sqrt(2) carries into the exponent
  const Vec k = to_float(shift_right<23>(lifted) - iset1(127 + down));
  const Vec f = as_float((lifted & iset1(0x007FFFFFu)) + iset1(0x3F3504F3u)) - set1(1.0f);
  const Vec square = f * f;
  Vec p = set1(-7.63449147e-2f);
  p = fma(p, f, set1(1.27615750e-1f));
  p = fma(p, f, set1(-1.31601840e-1f));
  p = fma(p, f, set1(1.42017588e-1f));
  p = fma(p, f, set1(-1.66233569e-1f));
  p = fma(p, f, set1(2.00012267e-1f));
  p = fma(p, f, set1(-2.50008196e-1f));
  p = fma(p, f, set1(3.33333313e-1f));
  p = fma(p * f, square, k * set1(-2.12194440e-4f));
  p = fma(set1(-0.5f), square, p);
  return fma(k, set1(0.693359375f), f + p);
}

// sin and cos of an angle in [0, 2 pi]: angle = n pi / 2 + r with |r| <= pi / 4.
FASTDIFF_INLINE void sincos(Vec angle, Vec& sine, Vec& cosine) {
  const Vec n = round(angle * set1(0.636619772f));
  Vec r = fma(n, set1(-1.5703125f), angle);  // pi / 2 in three parts; n times the first two is exact
  r = fma(n, set1(-4.83751297e-4f), r);
  r = fma(n, set1(-7.54978942e-8f), r);
  const Vec square = r * r;
  Vec s = set1(-1.95146320e-4f);
  s = fma(s, square, set1(8.33215564e-3f));
  s = fma(s, square, set1(-1.66666552e-1f));
  s = fma(s * square, r, r);
  Vec c = set1(2.44324128e-5f);
  c = fma(c, square, set1(-1.38873095e-3f));
  c = fma(c, square, set1(4.16666456e-2f));
  c = fma(c * square, square, fma(set1(-0.5f), square, set1(1.0f)));
  const IVec quarter = to_int(n);
  const Mask even = equal(quarter & iset1(1), iset1(0));
  sine = as_float(as_int(select(even, s, c)) ^ (shift_left<30>(quarter) & iset1(0x80000000u)));
  cosine = as_float(as_int(select(even, c, s)) ^ (shift_left<30>(quarter + iset1(1)) & iset1(0x80000000u)));
}

// --- activations ------------------------------------------------------------------------------------------------------

FASTDIFF_INLINE Vec relu(Vec x) { return max(zero(), x); }

FASTDIFF_INLINE Vec sigmoid(Vec x) { return set1(1.0f) / (set1(1.0f) + exp(negate(x))); }

// x sigmoid(x)
FASTDIFF_INLINE Vec silu(Vec x) { return x / (set1(1.0f) + exp(negate(x))); }

// a polynomial below 0.625, 1 - 2 / (e^{2x} + 1) from there
FASTDIFF_INLINE Vec tanh(Vec x) {
  const Vec t = magnitude(x), square = x * x;
  Vec p = set1(-5.70498733e-3f);
  p = fma(p, square, set1(2.06390880e-2f));
  p = fma(p, square, set1(-5.37397154e-2f));
  p = fma(p, square, set1(1.33314416e-1f));
  p = fma(p, square, set1(-3.33332807e-1f));
  p = fma(p * square, x, x);
  const Vec large = set1(1.0f) - set1(2.0f) / (exp(t + t) + set1(1.0f));
  return select(greater(t, set1(0.625f)), with_sign(large, x), p);
}

// 1 - erf(t) = e^{-t + t P(t)} for t > 0.92; fitted up to 6, and going to 0 beyond
FASTDIFF_INLINE Vec erfc_tail(Vec t) {
  Vec p = set1(-6.35683008e-8f);
  p = fma(p, t, set1(2.73159071e-6f));
  p = fma(p, t, set1(-5.26338445e-5f));
  p = fma(p, t, set1(6.05090696e-4f));
  p = fma(p, t, set1(-4.66934731e-3f));
  p = fma(p, t, set1(2.59007085e-2f));
  p = fma(p, t, set1(-1.08791769e-1f));
  p = fma(p, t, set1(-6.33527219e-1f));
  p = fma(p, t, set1(-1.29072741e-1f));
  return exp(fma(p, t, negate(t)));
}

// erf(x) for |x| < 0.94
FASTDIFF_INLINE Vec erf_small(Vec x) {
  const Vec square = x * x;
  Vec p = set1(8.25105235e-5f);
  p = fma(p, square, set1(-8.11406237e-4f));
  p = fma(p, square, set1(5.19846426e-3f));
  p = fma(p, square, set1(-2.68583447e-2f));
  p = fma(p, square, set1(1.12836763e-1f));
  p = fma(p, square, set1(-3.76126319e-1f));
  p = fma(p, square, set1(1.28379166e-1f));
  return fma(p, x, x);
}

FASTDIFF_INLINE Vec erf(Vec x) {
  const Vec t = magnitude(x);
  return select(greater(t, set1(0.93f)), with_sign(set1(1.0f) - erfc_tail(t), x), erf_small(x));
}

// x Phi(x) = x / 2 (1 + erf(x / sqrt 2)); the tail on the left keeps its digits, as nothing cancels
FASTDIFF_INLINE Vec gelu(Vec x) {
  const Vec y = x * set1(0.707106781f), t = magnitude(y);
  const Vec tail = erfc_tail(t);
  const Vec large = select(greater(y, zero()), set1(2.0f) - tail, tail);
  return x * set1(0.5f) * select(greater(t, set1(0.93f)), large, set1(1.0f) + erf_small(y));
}

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) = x sigmoid(2 sqrt(2 / pi) (..))
FASTDIFF_INLINE Vec gelu_tanh(Vec x) {
  const Vec opposite = fma(x * x, set1(-0.0713548162f), set1(-1.59576912f)) * x;
  return x / (set1(1.0f) + exp(opposite));
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
