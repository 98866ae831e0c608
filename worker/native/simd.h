// Vectors of 16 lanes: the only file that knows instructions. Compiled once for each level.
//
// Everything is defined down to the bit: sums and products are fused only where `fma` says so, and
// sums over lanes take the order of `sum`. On levels without fused multiply-add `fma` rounds twice,
// which is why levels differ in their last bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms in GCC 12's intrinsics
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define TPS_INLINE inline __attribute__((always_inline))

namespace tps::TPS_LEVEL {

TPS_INLINE uint16_t bf16_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // NaN stays one
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
TPS_INLINE float float_of_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
TPS_INLINE float float_of_f16(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // As a float whose exponent is too small by 112; the product repairs it, denormals included.
    return float_of_bits(sign | rest << 13) * 0x1p112f;
}
TPS_INLINE uint16_t f16_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits >= 0x7f800000) return uint16_t(sign | 0x7c00 | (bits > 0x7f800000 ? 0x200 : 0));
    if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
    if (bits < 0x38800000) {  // denormal: the addition aligns and rounds
        float value = float_of_bits(bits) + 0.5f;
        uint32_t sum;
        memcpy(&sum, &value, 4);
        return uint16_t(sign | (sum - 0x3f000000));
    }
    const uint32_t odd = bits >> 13 & 1;
    return uint16_t(sign | (bits - 0x38000000 + 0xfff + odd) >> 13);
}

#if defined(__AVX512F__)

using f32x16 = __m512;
using i32x16 = __m512i;
using bytes64 = __m512i;

TPS_INLINE f32x16 zero() { return _mm512_setzero_ps(); }
TPS_INLINE f32x16 set1(float v) { return _mm512_set1_ps(v); }
TPS_INLINE f32x16 load(const float* p) { return _mm512_loadu_ps(p); }
TPS_INLINE void store(float* p, f32x16 v) { _mm512_storeu_ps(p, v); }
TPS_INLINE f32x16 add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
TPS_INLINE f32x16 sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
TPS_INLINE f32x16 mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
TPS_INLINE f32x16 div(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
TPS_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand where one of them is NaN.
TPS_INLINE f32x16 max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
TPS_INLINE f32x16 min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
TPS_INLINE f32x16 abs(f32x16 a) { return _mm512_abs_ps(a); }
TPS_INLINE void load_bf16_pairs(const uint8_t* p, f32x16& even, f32x16& odd) {
    const __m512i both = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
}
TPS_INLINE f32x16 load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
TPS_INLINE f32x16 load_i8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
TPS_INLINE i32x16 round_to_i32(f32x16 v) { return _mm512_cvtps_epi32(v); }
TPS_INLINE f32x16 to_float(i32x16 v) { return _mm512_cvtepi32_ps(v); }
TPS_INLINE i32x16 set1_i32(int32_t v) { return _mm512_set1_epi32(v); }
TPS_INLINE f32x16 scale_by_power(f32x16 v, f32x16 magic) {  // see exp
    const __m512i power = _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(magic), 23),
                                           _mm512_set1_epi32(0x3f800000));
    return _mm512_mul_ps(v, _mm512_castsi512_ps(power));
}
TPS_INLINE void store_i8(int8_t* p, i32x16 v) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(v));
}
TPS_INLINE bytes64 load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
TPS_INLINE bytes64 low_nibbles(bytes64 v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
TPS_INLINE bytes64 high_nibbles(bytes64 v) {
    return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
}
TPS_INLINE void unpack(f32x16 v, float* lanes) { _mm512_storeu_ps(lanes, v); }

#if defined(__AVX512BF16__)
// 32 floats, rounded.
TPS_INLINE void store_bf16(uint16_t* to, const float* from) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(load(from + 16), load(from)));
}
TPS_INLINE void store_bf16_half(uint16_t* to, const float* from) {  // 16 of them
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(load(from)));
}
// acc + products of 16 pairs of weights with one pair of activations.
TPS_INLINE f32x16 dot_bf16(f32x16 acc, bytes64 w, const uint16_t* two) {
    int32_t a;
    memcpy(&a, two, 4);
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(a));
}
#endif

#if defined(__AVX512VNNI__)
TPS_INLINE i32x16 dot_u8(i32x16 acc, bytes64 w, const int8_t* four) {
    int32_t a;
    memcpy(&a, four, 4);
    return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(a));
}
#else
// Without VNNI: even and odd bytes apart, as 16-bit numbers, which cannot overflow.
TPS_INLINE i32x16 dot_u8(i32x16 acc, bytes64 w, const int8_t* four) {
    int32_t a;
    memcpy(&a, four, 4);
    const __m512i all = _mm512_set1_epi32(a);
    const __m512i a_even = _mm512_srai_epi16(_mm512_slli_epi16(all, 8), 8);
    const __m512i a_odd = _mm512_srai_epi16(all, 8);
    const __m512i w_even = _mm512_and_si512(w, _mm512_set1_epi16(255));
    const __m512i w_odd = _mm512_srli_epi16(w, 8);
    const __m512i pairs = _mm512_add_epi32(_mm512_madd_epi16(w_even, a_even),
                                           _mm512_madd_epi16(w_odd, a_odd));
    return _mm512_add_epi32(acc, pairs);
}
#endif

#elif defined(__AVX2__)

struct f32x16 { __m256 a, b; };
struct i32x16 { __m256i a, b; };
struct bytes64 { __m256i a, b; };

TPS_INLINE f32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
TPS_INLINE f32x16 set1(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
TPS_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TPS_INLINE void store(float* p, f32x16 v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
TPS_INLINE f32x16 add(f32x16 x, f32x16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
TPS_INLINE f32x16 sub(f32x16 x, f32x16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
TPS_INLINE f32x16 mul(f32x16 x, f32x16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
TPS_INLINE f32x16 div(f32x16 x, f32x16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
TPS_INLINE f32x16 fma(f32x16 x, f32x16 y, f32x16 z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
TPS_INLINE f32x16 max(f32x16 x, f32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
TPS_INLINE f32x16 min(f32x16 x, f32x16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
TPS_INLINE f32x16 abs(f32x16 x) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
TPS_INLINE void load_bf16_pairs(const uint8_t* p, f32x16& even, f32x16& odd) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)p);
    const __m256i y = _mm256_loadu_si256((const __m256i*)(p + 32));
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(y, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(x, upper)), _mm256_castsi256_ps(_mm256_and_si256(y, upper))};
}
TPS_INLINE f32x16 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
TPS_INLINE f32x16 load_i8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
TPS_INLINE i32x16 round_to_i32(f32x16 v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
TPS_INLINE f32x16 to_float(i32x16 v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
TPS_INLINE i32x16 set1_i32(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
TPS_INLINE __m256 scaled_half(__m256 v, __m256 magic) {
    const __m256i power = _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(magic), 23),
                                           _mm256_set1_epi32(0x3f800000));
    return _mm256_mul_ps(v, _mm256_castsi256_ps(power));
}
TPS_INLINE f32x16 scale_by_power(f32x16 v, f32x16 magic) {
    return {scaled_half(v.a, magic.a), scaled_half(v.b, magic.b)};
}
TPS_INLINE void store_i8(int8_t* p, i32x16 v) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i*)p, bytes);
}
TPS_INLINE bytes64 load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
TPS_INLINE bytes64 low_nibbles(bytes64 v) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)};
}
TPS_INLINE bytes64 high_nibbles(bytes64 v) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(v.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(v.b, 4), mask)};
}
TPS_INLINE void unpack(f32x16 v, float* lanes) { store(lanes, v); }

#if defined(__AVXVNNI__)
TPS_INLINE i32x16 dot_u8(i32x16 acc, bytes64 w, const int8_t* four) {
    int32_t a;
    memcpy(&a, four, 4);
    const __m256i all = _mm256_set1_epi32(a);
    return {_mm256_dpbusd_avx_epi32(acc.a, w.a, all), _mm256_dpbusd_avx_epi32(acc.b, w.b, all)};
}
#else
TPS_INLINE i32x16 dot_u8(i32x16 acc, bytes64 w, const int8_t* four) {
    int32_t a;
    memcpy(&a, four, 4);
    const __m256i all = _mm256_set1_epi32(a);
    const __m256i a_even = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8);
    const __m256i a_odd = _mm256_srai_epi16(all, 8);
    const __m256i low = _mm256_set1_epi16(255);
    const __m256i x = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(w.a, low), a_even),
                                       _mm256_madd_epi16(_mm256_srli_epi16(w.a, 8), a_odd));
    const __m256i y = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(w.b, low), a_even),
                                       _mm256_madd_epi16(_mm256_srli_epi16(w.b, 8), a_odd));
    return {_mm256_add_epi32(acc.a, x), _mm256_add_epi32(acc.b, y)};
}
#endif

#else  // any machine: plain arrays, which compilers vectorise as well as they can

struct f32x16 { float v[16]; };
struct i32x16 { int32_t v[16]; };
struct bytes64 { uint8_t v[64]; };

#define TPS_LANES(type, expression)               \
    type r;                                       \
    for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
    return r
TPS_INLINE f32x16 zero() { TPS_LANES(f32x16, 0.0f); }
TPS_INLINE f32x16 set1(float v) { TPS_LANES(f32x16, v); }
TPS_INLINE f32x16 load(const float* p) { TPS_LANES(f32x16, p[i]); }
TPS_INLINE void store(float* p, f32x16 v) { memcpy(p, v.v, 64); }
TPS_INLINE f32x16 add(f32x16 a, f32x16 b) { TPS_LANES(f32x16, a.v[i] + b.v[i]); }
TPS_INLINE f32x16 sub(f32x16 a, f32x16 b) { TPS_LANES(f32x16, a.v[i] - b.v[i]); }
TPS_INLINE f32x16 mul(f32x16 a, f32x16 b) { TPS_LANES(f32x16, a.v[i] * b.v[i]); }
TPS_INLINE f32x16 div(f32x16 a, f32x16 b) { TPS_LANES(f32x16, a.v[i] / b.v[i]); }
#if defined(__aarch64__)
TPS_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { TPS_LANES(f32x16, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
#else
TPS_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { TPS_LANES(f32x16, a.v[i] * b.v[i] + c.v[i]); }
#endif
TPS_INLINE f32x16 max(f32x16 a, f32x16 b) { TPS_LANES(f32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
TPS_INLINE f32x16 min(f32x16 a, f32x16 b) { TPS_LANES(f32x16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
TPS_INLINE f32x16 abs(f32x16 a) { TPS_LANES(f32x16, std::fabs(a.v[i])); }
TPS_INLINE void load_bf16_pairs(const uint8_t* p, f32x16& even, f32x16& odd) {
    for (int i = 0; i < 16; ++i) {
        uint32_t both;
        memcpy(&both, p + 4 * i, 4);
        even.v[i] = float_of_bits(both << 16);
        odd.v[i] = float_of_bits(both & 0xffff0000);
    }
}
TPS_INLINE f32x16 load_f16(const uint16_t* p) { TPS_LANES(f32x16, float_of_f16(p[i])); }
TPS_INLINE f32x16 load_i8(const int8_t* p) { TPS_LANES(f32x16, float(p[i])); }
TPS_INLINE i32x16 round_to_i32(f32x16 v) { TPS_LANES(i32x16, int32_t(std::nearbyint(v.v[i]))); }
TPS_INLINE f32x16 to_float(i32x16 v) { TPS_LANES(f32x16, float(v.v[i])); }
TPS_INLINE i32x16 set1_i32(int32_t v) { TPS_LANES(i32x16, v); }
TPS_INLINE f32x16 scale_by_power(f32x16 v, f32x16 magic) {
    f32x16 r;
    for (int i = 0; i < 16; ++i) {
        uint32_t bits;
        memcpy(&bits, &magic.v[i], 4);
        r.v[i] = v.v[i] * float_of_bits((bits << 23) + 0x3f800000);
    }
    return r;
}
TPS_INLINE void store_i8(int8_t* p, i32x16 v) {
    for (int i = 0; i < 16; ++i) p[i] = int8_t(v.v[i] < -128 ? -128 : v.v[i] > 127 ? 127 : v.v[i]);
}
TPS_INLINE bytes64 load_bytes(const uint8_t* p) {
    bytes64 r;
    memcpy(r.v, p, 64);
    return r;
}
TPS_INLINE bytes64 low_nibbles(bytes64 v) {
    for (uint8_t& byte : v.v) byte &= 15;
    return v;
}
TPS_INLINE bytes64 high_nibbles(bytes64 v) {
    for (uint8_t& byte : v.v) byte >>= 4;
    return v;
}
TPS_INLINE void unpack(f32x16 v, float* lanes) { memcpy(lanes, v.v, 64); }
#if defined(__ARM_FEATURE_DOTPROD)
// The instruction multiplies signed numbers: u = (u - 128) + 128, and the second part is
// 128 times the sum of the four.
TPS_INLINE i32x16 dot_u8(i32x16 acc, bytes64 w, const int8_t* four) {
    int32_t a;
    memcpy(&a, four, 4);
    const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(a));
    const int8x16_t ones = vdupq_n_s8(64);
    int32x4_t rest = vdotq_s32(vdupq_n_s32(0), ones, all);
    rest = vaddq_s32(rest, rest);
    for (int i = 0; i < 4; ++i) {
        const uint8x16_t u = vld1q_u8(w.v + 16 * i);
        const int8x16_t s = vreinterpretq_s8_u8(veorq_u8(u, vdupq_n_u8(128)));
        int32x4_t sum = vaddq_s32(vld1q_s32(acc.v + 4 * i), rest);
        vst1q_s32(acc.v + 4 * i, vdotq_s32(sum, s, all));
    }
    return acc;
}
#else
TPS_INLINE i32x16 dot_u8(i32x16 acc, bytes64 w, const int8_t* four) {
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 4; ++k) acc.v[i] += int32_t(w.v[4 * i + k]) * four[k];
    return acc;
}
#endif

#endif

// Sum and maximum of the lanes, halving.
TPS_INLINE float sum(f32x16 v) {
    float lanes[16];
    unpack(v, lanes);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
TPS_INLINE float max_of(f32x16 v) {
    float lanes[16];
    unpack(v, lanes);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

// e^x with a relative error of about 1e-7. Exactly 1 at 0 and exactly 0 at -88.1 and below; NaN stays.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor polynomial (degree 6), 2^n by the exponent.
TPS_INLINE f32x16 exp(f32x16 x) {
    x = min(set1(88.0f), max(set1(-88.1f), x));
    const f32x16 magic = set1(0x1.8p23f);  // added, it leaves the rounded integer in the lowest bits
    const f32x16 rounded = fma(x, set1(1.44269504f), magic);
    const f32x16 n = sub(rounded, magic);
    f32x16 r = fma(n, set1(-0.693145752f), x);
    r = fma(n, set1(-1.42860677e-6f), r);
    f32x16 p = set1(1.0f / 720);
    p = fma(p, r, set1(1.0f / 120));
    p = fma(p, r, set1(1.0f / 24));
    p = fma(p, r, set1(1.0f / 6));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return scale_by_power(p, rounded);
}

}  // namespace tps::TPS_LEVEL
