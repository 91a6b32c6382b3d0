// Activation programs (postfix, opcodes of moe_compile/ir/scalar.py) on short runs of floats, with derivatives if asked.
#pragma once
#include "common.h"

enum { OP_G, OP_U, OP_CONST, OP_ADD, OP_MUL, OP_POW, OP_CLAMP, OP_DIV, OP_UNARY = 16 };
enum { SIGMOID = OP_UNARY, TANH, EXP, LOG, ERF, RELU, SOFTPLUS, GELU_TANH, ABS, LOG1P, EXPM1, EXP2 };

constexpr int RUN = 8 * VL;  // floats per step of the program
constexpr int DEPTH = 8;     // stack entries; cpu.py refuses programs that need more

// exp to about one unit in the last place; NaN stays NaN, overflow is inf, below -103 it is 0.
static inline float exp_(float x) {
  x = x > 89.f ? 89.f : x;
  x = x < -104.f ? -104.f : x;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  float n = (x * 1.44269504f + magic) - magic;
  float r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  int32_t i = int32_t(float_to_bits(n + magic) - float_to_bits(magic));
  int32_t half = i >> 1;  // 2^n in two factors, so that the ends of the range are reached
  return p * bits_to_float(uint32_t(half + 127) << 23) * bits_to_float(uint32_t(i - half + 127) << 23);
}
// exp(-x), short of infinity: for what is to be divided by.
static inline float exp_minus(float x) { return exp_(-x > 88.f ? 88.f : -x); }
static inline float sigmoid_(float x) { return 1.f / (1.f + exp_minus(x)); }
static inline float tanh_(float x) {
  float q = x * x;  // Taylor near zero, where 1 - 2 / (1 + e^2x) cancels
  float small = x * (1.f + q * (-1.f / 3 + q * (2.f / 15 + q * (-17.f / 315 + q * (62.f / 2835 + q * (-1382.f / 155925))))));
  float large = 1.f - 2.f / (1.f + exp_(2.f * x));
  return q < 0.09f ? small : large;
}
static inline float erf_(float x) {
  float a = x < 0 ? -x : x, q = x * x;
  // Taylor below 1, Abramowitz and Stegun 7.1.26 above (absolute error 1.5e-7)
  float s = 1.f / 76204800;
  s = s * q - 1.f / 6894720;
  s = s * q + 1.f / 685440;
  s = s * q - 1.f / 75600;
  s = s * q + 1.f / 9360;
  s = s * q - 1.f / 1320;
  s = s * q + 1.f / 216;
  s = s * q - 1.f / 42;
  s = s * q + 1.f / 10;
  s = s * q - 1.f / 3;
  s = s * q + 1.f;
  float t = 1.f / (1.f + 0.3275911f * a);
  float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  float large = 1.f - p * exp_(-q);
  return a < 1.f ? 1.12837917f * x * s : (x < 0 ? -large : large);
}
// log(1 + x): 2 atanh(x / (2 + x)) near zero, where 1 + x loses the digits of x
static inline float log1p_(float x) {
  float z = x / (2.f + x), q = z * z;
  float small = 2.f * z * (1.f + q * (1.f / 3 + q * (1.f / 5 + q * (1.f / 7 + q * (1.f / 9 + q * (1.f / 11 + q * (1.f / 13)))))));
  return x > -0.5f && x < 0.5f ? small : logf(1.f + x);
}
// exp(x) - 1: Taylor near zero
static inline float expm1_(float x) {
  float p = 1.f / 362880;
  p = p * x + 1.f / 40320;
  p = p * x + 1.f / 5040;
  p = p * x + 1.f / 720;
  p = p * x + 1.f / 120;
  p = p * x + 1.f / 24;
  p = p * x + 1.f / 6;
  p = p * x + 0.5f;
  p = p * x + 1.f;
  return x > -0.5f && x < 0.5f ? x * p : exp_(x) - 1.f;
}
static inline float gelu_tanh_inner(float x) { return 0.797884561f * (x + 0.044715f * x * x * x); }
static inline float power(float v, float p) { return p == 2.f ? v * v : p == -1.f ? 1.f / v : p == 0.5f ? sqrtf(v) : p == 3.f ? v * v * v : powf(v, p); }

#define EACH(stmt) do { for (int i = 0; i < RUN; i++) { stmt; } } while (0)

// v[i] = e^v[i], as exp_.
static void exponentials(float* v) {
#if defined(WIDE_VECTORS)
  for (int i = 0; i < RUN; i += VL) {  // min and max hand a NaN in the second operand on
    __m512 x = _mm512_max_ps(_mm512_set1_ps(-104.f), _mm512_min_ps(_mm512_set1_ps(89.f), _mm512_loadu_ps(v + i)));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x));
    __m512 p = _mm512_set1_ps(1.f / 5040);
    for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    _mm512_storeu_ps(v + i, _mm512_scalef_ps(p, n));
  }
#else
  EACH(v[i] = exp_(v[i]));
#endif
}

// v[i] = 1 / v[i] for values in [1, e^88] and NaN: an estimate of 14 bits and a step of Newton's where a division would take three times as long.
static void reciprocals(float* v) {
#if defined(WIDE_VECTORS)
  for (int i = 0; i < RUN; i += VL) {
    __m512 d = _mm512_loadu_ps(v + i), e = _mm512_rcp14_ps(d);
    _mm512_storeu_ps(v + i, _mm512_mul_ps(e, _mm512_fnmadd_ps(d, e, _mm512_set1_ps(2.f))));
  }
#else
  EACH(v[i] = 1.f / v[i]);
#endif
}

// value[i] = f(value[i]); slope[i] = f' unless null
static void unary(i64 op, float* v, float* s) {
  switch (op) {
    case SIGMOID: EACH(v[i] = -v[i] > 88.f ? 88.f : -v[i]); exponentials(v); EACH(v[i] += 1.f); reciprocals(v); if (s) EACH(s[i] = v[i] * (1.f - v[i])); break;
    case TANH: EACH(v[i] = tanh_(v[i])); if (s) EACH(s[i] = 1.f - v[i] * v[i]); break;
    case EXP: exponentials(v); if (s) EACH(s[i] = v[i]); break;
    case LOG: if (s) EACH(s[i] = 1.f / v[i]); EACH(v[i] = logf(v[i])); break;
    case ERF: if (s) EACH(s[i] = 1.12837917f * exp_(-v[i] * v[i])); EACH(v[i] = erf_(v[i])); break;
    case RELU: if (s) EACH(s[i] = v[i] > 0 ? 1.f : 0.f); EACH(v[i] = v[i] < 0 ? 0.f : v[i]); break;
    case SOFTPLUS: if (s) EACH(s[i] = sigmoid_(v[i])); EACH(v[i] = v[i] > 20.f ? v[i] : log1pf(expf(v[i]))); break;
    case GELU_TANH:
      for (int i = 0; i < RUN; i++) {
        float x = v[i], t = tanh_(gelu_tanh_inner(x));
        if (s) s[i] = 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * 0.797884561f * (1.f + 3.f * 0.044715f * x * x);
        v[i] = 0.5f * x * (1.f + t);
      }
      break;
    case LOG1P: if (s) EACH(s[i] = 1.f / (1.f + v[i])); EACH(v[i] = log1p_(v[i])); break;
    case EXPM1: EACH(v[i] = expm1_(v[i])); if (s) EACH(s[i] = v[i] + 1.f); break;
    case EXP2: EACH(v[i] = exp2f(v[i])); if (s) EACH(s[i] = 0.693147181f * v[i]); break;
    case ABS: if (s) EACH(s[i] = v[i] > 0 ? 1.f : v[i] < 0 ? -1.f : 0.f); EACH(v[i] = fabsf(v[i])); break;
  }
}

struct Program {
  const i64* ops;
  const float* consts;
  i64 n;
};

// out[i] = f(g[i], u[i]) for RUN floats; with DUAL also dg and du, the partial derivatives.
template <bool DUAL>
static void run_program(const Program& p, const float* g, const float* u, float* out, float* dg, float* du) {
  alignas(64) float v[DEPTH][RUN], vg[DUAL ? DEPTH : 1][RUN], vu[DUAL ? DEPTH : 1][RUN], s[RUN];
  int top = -1;
  const float* c = p.consts;
  for (i64 o = 0; o < p.n; o++) {
    i64 op = p.ops[o];
    if (op <= OP_CONST) {
      top++;
      const float* from = op == OP_G ? g : u;
      float constant = op == OP_CONST ? *c++ : 0.f;
      if (op == OP_CONST) EACH(v[top][i] = constant);
      else memcpy(v[top], from, sizeof(v[top]));
      if (DUAL) EACH(vg[top][i] = op == OP_G; vu[top][i] = op == OP_U);
      continue;
    }
    float *a = v[top], *ag = vg[DUAL ? top : 0], *au = vu[DUAL ? top : 0];
    if (op == OP_ADD || op == OP_MUL || op == OP_DIV) {
      const float *b = v[top], *bg = ag, *bu = au;
      top--;
      a = v[top], ag = vg[DUAL ? top : 0], au = vu[DUAL ? top : 0];
      if (op == OP_ADD) {
        EACH(a[i] += b[i]);
        if (DUAL) EACH(ag[i] += bg[i]; au[i] += bu[i]);
      } else if (op == OP_DIV) {
        EACH(a[i] /= b[i]);
        if (DUAL) EACH(ag[i] = (ag[i] - a[i] * bg[i]) / b[i]; au[i] = (au[i] - a[i] * bu[i]) / b[i]);
      } else {
        if (DUAL) EACH(ag[i] = ag[i] * b[i] + a[i] * bg[i]; au[i] = au[i] * b[i] + a[i] * bu[i]);
        EACH(a[i] *= b[i]);
      }
      continue;
    }
    if (op == OP_POW) {
      float e = *c++;
      if (DUAL) EACH(s[i] = e * power(a[i], e - 1.f));
      if (e == 2.f) EACH(a[i] *= a[i]);
      else EACH(a[i] = power(a[i], e));
    } else if (op == OP_CLAMP) {
      float lo = c[0], hi = c[1];
      c += 2;
#ifdef OPEN_CLAMP  // the slope at a limit is 0, not 1: torch's own from 2.14 on
      if (DUAL) EACH(s[i] = a[i] > lo && a[i] < hi ? 1.f : 0.f);
#else
      if (DUAL) EACH(s[i] = a[i] >= lo && a[i] <= hi ? 1.f : 0.f);
#endif
      EACH(a[i] = a[i] < lo ? lo : a[i]);
      EACH(a[i] = a[i] > hi ? hi : a[i]);
    } else {
      unary(op, a, DUAL ? s : nullptr);
    }
    if (DUAL) EACH(ag[i] = ag[i] == 0.f ? 0.f : ag[i] * s[i]; au[i] = au[i] == 0.f ? 0.f : au[i] * s[i]);
  }
  memcpy(out, v[0], sizeof(v[0]));
  if (DUAL) memcpy(dg, vg[0], sizeof(v[0])), memcpy(du, vu[0], sizeof(v[0]));
}
