// The search in AVX2 with FMA (Intel since Haswell, AMD since Zen): see native_search.h.
//
// Its 8-bit products are added in pairs to 16 bits, which must not overflow: integers of rows are stored in 7 bits, and
// those of queries have a magnitude of 64 at most, so that two such sums can be added: 2 * 2 * 127 * 64 < 2^15.
//
// Only functions with this attribute may use the instructions, so that one library holds all versions. The attribute
// is not inherited by templates and lambdas.

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "native_search.h"

#define WITH_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace {

constexpr int64_t ROWS = 8;
constexpr int64_t TILES = 2;  // with QUERIES: 8 of 16 registers hold sums
constexpr int MOST_ROW = 63;
constexpr int OFFSET = 64;

// Every processor with AVX2 has F16C, which compilers cannot ask for by name before GCC 11.
bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// A mask of the first `count` of 8 lanes.
WITH_AVX2 inline __m256i lanes(int64_t count) {
  alignas(32) static const int32_t on_off[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
  const int64_t held = count >= 8 ? 8 : count > 0 ? count : 0;
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(on_off + 8 - held));
}

WITH_AVX2 inline __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

WITH_AVX2 inline double sum_of(__m256d x) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// Four floats, or the first of a mask, as doubles.
WITH_AVX2 inline __m256d doubles(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }
WITH_AVX2 inline __m256d doubles(__m256i in, const float* x) {
  return _mm256_cvtps_pd(_mm_maskload_ps(x, _mm256_castsi256_si128(in)));
}

WITH_AVX2 double dot(const float* x, const float* y, int64_t d) {
  __m256d even = _mm256_setzero_pd(), odd = _mm256_setzero_pd();
  int64_t i = 0;
  for (; i + 8 <= d; i += 8) {
    even = _mm256_fmadd_pd(doubles(x + i), doubles(y + i), even);
    odd = _mm256_fmadd_pd(doubles(x + i + 4), doubles(y + i + 4), odd);
  }
  for (; i < d; i += 4) {
    const __m256i in = lanes(d - i);
    even = _mm256_fmadd_pd(doubles(in, x + i), doubles(in, y + i), even);
  }
  return sum_of(_mm256_add_pd(even, odd));
}

WITH_AVX2 void quantize(const float* row, const float* center, int64_t d, int64_t width, uint8_t* integers,
                        float* scale, float* half) {
  alignas(32) float centered[WIDEST];
  const __m256 infinity = _mm256_set1_ps(INFINITY);
  __m256 largest = _mm256_setzero_ps(), finite = _mm256_cmp_ps(infinity, infinity, _CMP_EQ_OQ);
  for (int64_t i = 0; i < width; i += 8) {
    const __m256i in = lanes(d - i);
    const __m256 x = _mm256_maskload_ps(row + i, in);
    const __m256 y = _mm256_sub_ps(x, _mm256_maskload_ps(center + i, in));
    finite = _mm256_and_ps(finite, _mm256_cmp_ps(magnitude(x), infinity, _CMP_LT_OQ));
    largest = _mm256_max_ps(largest, magnitude(y));
    _mm256_store_ps(centered + i, y);
  }
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  const float most = _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
  const bool all_finite = _mm256_movemask_ps(finite) == 0xFF, in_range = all_finite && most < INFINITY;
  if (!in_range) {
    std::memset(integers, OFFSET, width);
    *scale = 0.0f;
    *half = all_finite ? INFINITY : NAN;
    return;
  }
  const float inverse = most > TINIEST ? MOST_ROW / most : 0.0f;
  const __m256i offset = _mm256_set1_epi32(OFFSET);
  __m256i sums = _mm256_setzero_si256();
  for (int64_t i = 0; i < width; i += 16) {
    const __m256 factor = _mm256_set1_ps(inverse);
    const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(centered + i), factor));
    const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(centered + i + 8), factor));
    sums = _mm256_add_epi32(sums, _mm256_add_epi32(_mm256_abs_epi32(first), _mm256_abs_epi32(second)));
    const __m256i words = _mm256_packs_epi32(_mm256_add_epi32(first, offset), _mm256_add_epi32(second, offset));
    const __m256i in_order = _mm256_permute4x64_epi64(words, 0xD8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(integers + i), bytes);
  }
  alignas(32) int32_t parts[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sums);
  int32_t sum = 0;
  for (int32_t part : parts) sum += part;
  *scale = inverse > 0.0f ? most / MOST_ROW : 2.0f * most;  // the bound also holds where all integers are 0
  *half = SLACK / 2.0f * *scale * static_cast<float>(sum);
}

using Sums = __m256i[QUERIES][TILES];

// All loops are unrolled, so that the sums stay in registers.
WITH_AVX2 inline __attribute__((always_inline)) void add_products(const uint8_t* tiles, int64_t groups,
                                                                  const int8_t* const* queries, const int32_t* starts,
                                                                  Sums& sums) {
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int i = 0; i < QUERIES; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < TILES; ++j) sums[i][j] = _mm256_set1_epi32(starts[i]);
  for (int64_t g = 0; g < groups; g += 2) {  // their number is a multiple of 4
    __m256i four[TILES], next[TILES];
#pragma GCC unroll 2
    for (int j = 0; j < TILES; ++j) {
      const __m256i* at = reinterpret_cast<const __m256i*>(tiles + (j * groups + g) * ROWS * 4);
      four[j] = _mm256_load_si256(at);
      next[j] = _mm256_load_si256(at + 1);
    }
#pragma GCC unroll 4
    for (int i = 0; i < QUERIES; ++i) {
      int32_t x, y;
      std::memcpy(&x, queries[i] + g * 4, 4);
      std::memcpy(&y, queries[i] + g * 4 + 4, 4);
      const __m256i repeated = _mm256_set1_epi32(x), repeated_next = _mm256_set1_epi32(y);
#pragma GCC unroll 2
      for (int j = 0; j < TILES; ++j) {
        const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(four[j], repeated),
                                               _mm256_maddubs_epi16(next[j], repeated_next));
        sums[i][j] = _mm256_add_epi32(sums[i][j], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
}

WITH_AVX2 void scores(const uint8_t* tiles, int64_t groups, const int8_t* const* queries, const int32_t* starts,
                      const float* scales, float* scores) {
  Sums sums;
  add_products(tiles, groups, queries, starts, sums);
#pragma GCC unroll 4
  for (int i = 0; i < QUERIES; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < TILES; ++j) {
      const __m256 score = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i][j]), _mm256_loadu_ps(scales + j * ROWS));
      _mm256_storeu_ps(scores + (i * TILES + j) * ROWS, score);
    }
  }
}

WITH_AVX2 void candidates(const uint8_t* tiles, int64_t groups, const int8_t* const* queries, const int32_t* starts,
                          const float* bars, const float* scales, const float* halves, uint64_t* candidates) {
  Sums sums;
  add_products(tiles, groups, queries, starts, sums);
#pragma GCC unroll 4
  for (int i = 0; i < QUERIES; ++i) {
    const __m256 bar = _mm256_set1_ps(bars[i]);
    candidates[i] = 0;
#pragma GCC unroll 2
    for (int j = 0; j < TILES; ++j) {
      const __m256 scale = _mm256_loadu_ps(scales + j * ROWS), half = _mm256_loadu_ps(halves + j * ROWS);
      const __m256 bound = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i][j]), scale, half);
      candidates[i] |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps(bound, bar, _CMP_GE_OQ))) << (j * ROWS);
    }
  }
}

// There is no branch that depends on the scores' order, which would often be mispredicted.
WITH_AVX2 double replace_lowest(double score, int64_t row, int64_t room, double lowest, double* scores, int64_t* rows) {
  __m256d least = _mm256_set1_pd(INFINITY);
  int64_t at = -1;
  for (int64_t i = 0; i < room; i += 4) {
    __m256d x = _mm256_loadu_pd(scores + i);
    const int equal = at < 0 ? _mm256_movemask_pd(_mm256_cmp_pd(x, _mm256_set1_pd(lowest), _CMP_EQ_OQ)) : 0;
    if (equal) {
      at = i + __builtin_ctz(equal);
      scores[at] = score;
      rows[at] = row;
      x = _mm256_loadu_pd(scores + i);
    }
    least = _mm256_min_pd(least, x);
  }
  const __m128d two = _mm_min_pd(_mm256_castpd256_pd128(least), _mm256_extractf128_pd(least, 1));
  return _mm_cvtsd_f64(_mm_min_sd(two, _mm_unpackhi_pd(two, two)));
}

// Eight numbers of half precision, or the first `count` of them, as floats.
WITH_AVX2 inline __m256 floats(const uint16_t* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
WITH_AVX2 inline __m256 floats(int64_t count, const uint16_t* x) {
  uint16_t held[8] = {};
  std::memcpy(held, x, 2 * (count < 8 ? count : 8));
  return floats(held);
}

WITH_AVX2 void widen(const uint16_t* halves, int64_t d, float* to) {
  int64_t i = 0;
  for (; i + 8 <= d; i += 8) _mm256_storeu_ps(to + i, floats(halves + i));
  if (i < d) _mm256_maskstore_ps(to + i, lanes(d - i), floats(d - i, halves + i));
}

WITH_AVX2 inline float dot_half(const float* x, const uint16_t* y, int64_t d) {
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t i = 0;
  for (; i + 32 <= d; i += 32) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sums[j] = _mm256_fmadd_ps(_mm256_loadu_ps(x + i + 8 * j), floats(y + i + 8 * j), sums[j]);
  }
  for (; i < d; i += 8) sums[0] = _mm256_fmadd_ps(_mm256_maskload_ps(x + i, lanes(d - i)), floats(d - i, y + i), sums[0]);
  const __m256 sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

WITH_AVX2 void dot_halves(const float* x, const uint16_t* const* rows, int64_t count, int64_t d, float* products) {
  for (int64_t i = 0; i < count; ++i) products[i] = dot_half(x, rows[i], d);
}

}  // namespace

const Instructions AVX2 = {ROWS,     TILES,      MOST_ROW, OFFSET,         64,    supported, dot,
                           quantize, candidates, scores,   replace_lowest, widen, dot_halves};
