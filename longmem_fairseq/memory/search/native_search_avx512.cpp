// The search in AVX-512 with VNNI (Intel since Cascade Lake, AMD since Zen 4): see native_search.h.
//
// Only functions with this attribute may use the instructions, so that one library holds all versions. The attribute
// is not inherited by templates and lambdas.

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "native_search.h"

#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))

namespace {

constexpr int64_t ROWS = 16;
constexpr int64_t TILES = 4;  // with QUERIES: 16 of 32 registers hold sums
constexpr int OFFSET = 128;

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

// A mask of the first `count` of 16 lanes.
WITH_AVX512 inline __mmask16 lanes(int64_t count) { return count >= 16 ? 0xFFFF : count > 0 ? (1u << count) - 1 : 0; }

// Eight floats, or the first of a mask, as doubles.
WITH_AVX512 inline __m512d doubles(const float* x) { return _mm512_cvtps_pd(_mm256_loadu_ps(x)); }
WITH_AVX512 inline __m512d doubles(__mmask8 in, const float* x) { return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(in, x)); }

WITH_AVX512 double dot(const float* x, const float* y, int64_t d) {
  __m512d even = _mm512_setzero_pd(), odd = _mm512_setzero_pd();
  int64_t i = 0;
  for (; i + 16 <= d; i += 16) {
    even = _mm512_fmadd_pd(doubles(x + i), doubles(y + i), even);
    odd = _mm512_fmadd_pd(doubles(x + i + 8), doubles(y + i + 8), odd);
  }
  for (; i < d; i += 8) {
    const __mmask8 in = static_cast<__mmask8>(lanes(d - i));
    even = _mm512_fmadd_pd(doubles(in, x + i), doubles(in, y + i), even);
  }
  return _mm512_reduce_add_pd(_mm512_add_pd(even, odd));
}

WITH_AVX512 void quantize(const float* row, const float* center, int64_t d, int64_t width, uint8_t* integers,
                          float* scale, float* half) {
  alignas(64) float centered[WIDEST];
  const __m512 infinity = _mm512_set1_ps(INFINITY);
  __m512 largest = _mm512_setzero_ps();
  __mmask16 finite = 0xFFFF;
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 in = lanes(d - i);
    const __m512 x = _mm512_maskz_loadu_ps(in, row + i);
    const __m512 y = _mm512_sub_ps(x, _mm512_maskz_loadu_ps(in, center + i));
    finite &= _mm512_cmp_ps_mask(_mm512_abs_ps(x), infinity, _CMP_LT_OQ);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(y));
    _mm512_store_ps(centered + i, y);
  }
  const float most = _mm512_reduce_max_ps(largest);
  const bool in_range = finite == 0xFFFF && most < INFINITY;
  const float inverse = in_range && most > TINIEST ? 127.0f / most : 0.0f;
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < width; i += 16) {
    const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(centered + i), _mm512_set1_ps(inverse));
    const __m512i whole = _mm512_maskz_cvtps_epi32(inverse > 0.0f ? 0xFFFF : 0, scaled);
    sum = _mm512_add_epi32(sum, _mm512_abs_epi32(whole));
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(OFFSET)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(integers + i), bytes);
  }
  if (!in_range) {
    *scale = 0.0f;
    *half = finite == 0xFFFF ? INFINITY : NAN;
  } else {
    *scale = inverse > 0.0f ? most / 127.0f : 2.0f * most;  // the bound also holds where all integers are 0
    *half = SLACK / 2.0f * *scale * static_cast<float>(_mm512_reduce_add_epi32(sum));
  }
}

using Sums = __m512i[QUERIES][TILES];

// All loops are unrolled, so that the sums stay in registers.
WITH_AVX512 inline __attribute__((always_inline)) void add_products(const uint8_t* tiles, int64_t groups,
                                                                    const int8_t* const* queries,
                                                                    const int32_t* starts, Sums& sums) {
#pragma GCC unroll 4
  for (int i = 0; i < QUERIES; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < TILES; ++j) sums[i][j] = _mm512_set1_epi32(starts[i]);
  for (int64_t g = 0; g < groups; ++g) {
    __m512i four[TILES];
#pragma GCC unroll 4
    for (int j = 0; j < TILES; ++j) four[j] = _mm512_load_si512(tiles + (j * groups + g) * ROWS * 4);
#pragma GCC unroll 4
    for (int i = 0; i < QUERIES; ++i) {
      int32_t x;
      std::memcpy(&x, queries[i] + g * 4, 4);
      const __m512i repeated = _mm512_set1_epi32(x);
#pragma GCC unroll 4
      for (int j = 0; j < TILES; ++j) sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], four[j], repeated);
    }
  }
}

WITH_AVX512 void scores(const uint8_t* tiles, int64_t groups, const int8_t* const* queries, const int32_t* starts,
                        const float* scales, float* scores) {
  Sums sums;
  add_products(tiles, groups, queries, starts, sums);
#pragma GCC unroll 4
  for (int i = 0; i < QUERIES; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < TILES; ++j) {
      const __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i][j]), _mm512_loadu_ps(scales + j * ROWS));
      _mm512_storeu_ps(scores + (i * TILES + j) * ROWS, score);
    }
  }
}

WITH_AVX512 void candidates(const uint8_t* tiles, int64_t groups, const int8_t* const* queries, const int32_t* starts,
                            const float* bars, const float* scales, const float* halves, uint64_t* candidates) {
  Sums sums;
  add_products(tiles, groups, queries, starts, sums);
#pragma GCC unroll 4
  for (int i = 0; i < QUERIES; ++i) {
    const __m512 bar = _mm512_set1_ps(bars[i]);
    candidates[i] = 0;
#pragma GCC unroll 4
    for (int j = 0; j < TILES; ++j) {
      const __m512 scale = _mm512_loadu_ps(scales + j * ROWS), half = _mm512_loadu_ps(halves + j * ROWS);
      const __m512 bound = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i][j]), scale, half);
      candidates[i] |= static_cast<uint64_t>(_mm512_cmp_ps_mask(bound, bar, _CMP_GE_OQ)) << (j * ROWS);
    }
  }
}

// There is no branch that depends on the scores' order, which would often be mispredicted.
WITH_AVX512 double replace_lowest(double score, int64_t row, int64_t room, double lowest, double* scores,
                                  int64_t* rows) {
  __m512d least = _mm512_set1_pd(INFINITY);
  int64_t at = -1;
  for (int64_t i = 0; i < room; i += 8) {
    __m512d x = _mm512_loadu_pd(scores + i);
    const unsigned equal = at < 0 ? _mm512_cmp_pd_mask(x, _mm512_set1_pd(lowest), _CMP_EQ_OQ) : 0;
    if (equal) {
      at = i + __builtin_ctz(equal);
      scores[at] = score;
      rows[at] = row;
      x = _mm512_mask_mov_pd(x, equal & -equal, _mm512_set1_pd(score));
    }
    least = _mm512_min_pd(least, x);
  }
  return _mm512_reduce_min_pd(least);
}

// Sixteen numbers of half precision, or the first of a mask, as floats.
WITH_AVX512 inline __m512 floats(const uint16_t* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
WITH_AVX512 inline __m512 floats(__mmask16 in, const uint16_t* x) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(in, x));
}

WITH_AVX512 void widen(const uint16_t* halves, int64_t d, float* to) {
  int64_t i = 0;
  for (; i + 16 <= d; i += 16) _mm512_storeu_ps(to + i, floats(halves + i));
  if (i < d) _mm512_mask_storeu_ps(to + i, lanes(d - i), floats(lanes(d - i), halves + i));
}

// Several rows at a time share the loads of x.
template <int COUNT>
WITH_AVX512 inline __attribute__((always_inline)) void dot_some(const float* x, const uint16_t* const* rows, int64_t d,
                                                                float* products) {
  __m512 sums[COUNT][4];
#pragma GCC unroll 4
  for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[r][j] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 64 <= d; i += 64) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 y = _mm512_loadu_ps(x + i + 16 * j);
#pragma GCC unroll 4
      for (int r = 0; r < COUNT; ++r) sums[r][j] = _mm512_fmadd_ps(y, floats(rows[r] + i + 16 * j), sums[r][j]);
    }
  }
  for (; i < d; i += 16) {
    const __mmask16 in = lanes(d - i);
    const __m512 y = _mm512_maskz_loadu_ps(in, x + i);
#pragma GCC unroll 4
    for (int r = 0; r < COUNT; ++r) sums[r][0] = _mm512_fmadd_ps(y, floats(in, rows[r] + i), sums[r][0]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < COUNT; ++r) {
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[r][0], sums[r][1]), _mm512_add_ps(sums[r][2], sums[r][3]));
    products[r] = _mm512_reduce_add_ps(sum);
  }
}

WITH_AVX512 void dot_halves(const float* x, const uint16_t* const* rows, int64_t count, int64_t d, float* products) {
  for (; count >= 4; count -= 4, rows += 4, products += 4) dot_some<4>(x, rows, d, products);
  for (; count > 0; --count, ++rows, ++products) dot_some<1>(x, rows, d, products);
}

}  // namespace

const Instructions AVX512 = {ROWS,     TILES,      127,    OFFSET,         127,   supported, dot,
                             quantize, candidates, scores, replace_lowest, widen, dot_halves};
