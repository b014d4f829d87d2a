// Exact search of one head: the rows of a table with the largest inner products with each query.
//
// All products are first taken in 8-bit integers, four times as fast as in float. How far such a product can be from
// the true one is known, so only rows that may be among the n best are compared in float. The result is exact; how many
// products are taken twice, and so the time, depends on the numbers.
//
// With q = sq * a + dq and k = sk * b + dk, where a and b are integers between -127 and 127 and each |dq| <= sq / 2 and
// |dk| <= sk / 2:    |q . k - sq * sk * (a . b)|  <=  sk / 2 * |q|_1  +  sq / 2 * sk * |b|_1,
// so that    q . k / sq  <=  sk * (a . b + |q|_1 / (2 sq)) + sk * |b|_1 / 2,    where all but a . b is known before.
// Rows are quantized less a centre, since what all of them have in common takes bits and ranks nothing.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace {

constexpr int64_t ROWS = 16;     // rows of a tile: one 32-bit sum of each in a register
constexpr int64_t TILES = 4;     // tiles and
constexpr int64_t QUERIES = 4;   // queries whose sums are taken together: 16 of 32 registers
constexpr int64_t BLOCK = 16;    // tiles that are quantized at a time and stay in the nearest cache
constexpr int64_t SAMPLE = 256;  // rows that the centre is the mean of
constexpr int64_t WIDEST = 1024;  // 127 * 127 * 1024 is exact in a float
constexpr float SLACK = 1.01f;   // on bounds, for rounding
constexpr float INF = std::numeric_limits<float>::infinity();

// The first of 16 lanes.
__mmask16 lanes(int64_t count) { return count >= 16 ? 0xFFFF : count > 0 ? (1u << count) - 1 : 0; }

float dot(const float* x, const float* y, int64_t d) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < d; i += 16) {
    const __mmask16 in = lanes(d - i);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(in, x + i), _mm512_maskz_loadu_ps(in, y + i), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

// Integers of x less the centre (none for null) between -127 and 127, as bytes plus an offset; out has room for `width`
// of them, the last of which are zero. Gives their scale and the sum of their amounts; false where x is not finite.
bool quantize(const float* x, const float* centre, int64_t d, int64_t width, int offset, uint8_t* out, float* scale,
              int32_t* amounts) {
  alignas(64) float moved[WIDEST];
  __m512 largest = _mm512_setzero_ps();
  __mmask16 finite = 0xFFFF;
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 in = lanes(d - i);
    __m512 y = _mm512_maskz_loadu_ps(in, x + i);
    if (centre) y = _mm512_sub_ps(y, _mm512_maskz_loadu_ps(in, centre + i));
    _mm512_store_ps(moved + i, y);
    y = _mm512_abs_ps(y);
    finite &= _mm512_cmp_ps_mask(y, _mm512_set1_ps(INF), _CMP_LT_OQ);
    largest = _mm512_max_ps(largest, y);
  }
  if (finite != 0xFFFF) return false;
  const float most = _mm512_reduce_max_ps(largest);
  const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
  *scale = inverse > 0.0f ? most / 127.0f : 2.0f * most;  // where all is rounded to zero, |x| <= scale / 2 too
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < width; i += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(moved + i), _mm512_set1_ps(inverse)));
    sum = _mm512_add_epi32(sum, _mm512_abs_epi32(whole));
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(offset)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), bytes);
  }
  *amounts = _mm512_reduce_add_epi32(sum);
  return true;
}

struct Query {
  float inverse;  // 1 / sq
  float shift;    // q . centre, less what rounding may take
  float least;    // score of the n-th best row so far; -inf while there are fewer, inf where nothing is to be found
  int32_t start;  // |q|_1 / (2 sq), and takes the rows' offset of 128 back
};

// Takes the place of the lowest of `room` scores, a multiple of 16, and gives the lowest then; without a branch that
// depends on the scores, since nobody could foresee it.
float replace_lowest(float score, int64_t row, int64_t room, float lowest, float* scores, int64_t* rows) {
  __m512 least = _mm512_set1_ps(INF);
  int64_t at = -1;
  for (int64_t i = 0; i < room; i += 16) {
    __m512 x = _mm512_loadu_ps(scores + i);
    const unsigned equal = at < 0 ? _mm512_cmp_ps_mask(x, _mm512_set1_ps(lowest), _CMP_EQ_OQ) : 0;
    if (equal) {
      at = i + __builtin_ctz(equal);
      scores[at] = score;
      rows[at] = row;
      x = _mm512_mask_mov_ps(x, equal & -equal, _mm512_set1_ps(score));
    }
    least = _mm512_min_ps(least, x);
  }
  return _mm512_reduce_min_ps(least);
}

}  // namespace

// Whether this processor has what is used here.
extern "C" int longmem_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

// Queries (T, d) and a table of rows of width d <= 1024, of which those in `spans` (begin, end, begin, end...) count; for
// each query the numbers of the n best rows, best first, go into found (T, n), which is -1 where there are none.
// Queries that are not finite find nothing, and rows that are not are not found.
extern "C" void longmem_search(const float* queries, int64_t T, const float* table, int64_t d, const int64_t* spans,
                              int64_t n_spans, int64_t n, int64_t* found) {
  const int64_t width = (d + 15) / 16 * 16, groups = width / 4;

  std::vector<float> centre(d, 0.0f);
  int64_t held = 0, sampled = 0;
  for (int64_t s = 0; s < n_spans; ++s) held += spans[2 * s + 1] - spans[2 * s];
  const int64_t step = std::max<int64_t>(1, held / SAMPLE);
  for (int64_t s = 0; s < n_spans; ++s)
    for (int64_t row = spans[2 * s]; row < spans[2 * s + 1]; row += step, ++sampled)
      for (int64_t i = 0; i < d; ++i) centre[i] += table[row * d + i];
  for (float& x : centre) {
    x /= std::max<int64_t>(1, sampled);
    if (!(std::fabs(x) < INF)) x = 0.0f;
  }

  const int64_t padded = (T + QUERIES - 1) / QUERIES * QUERIES;
  std::vector<Query> about(padded, Query{0.0f, 0.0f, INF, 0});
  std::vector<uint8_t> bytes(padded * width, 0);
  const int64_t room = (n + 15) / 16 * 16;
  std::vector<float> scores(T * room, -INF);
  std::vector<int64_t> best(T * room, -1);
  for (int64_t t = 0; t < T; ++t) {
    const float* q = queries + t * d;
    int32_t amounts;
    float scale;
    Query& x = about[t];
    std::fill(&scores[t * room + n], &scores[t * room] + room, INF);  // stays
    if (!quantize(q, nullptr, d, width, 0, &bytes[t * width], &scale, &amounts)) continue;
    float sum = 0.0f, rounding = 0.0f;
    int32_t whole = 0;
    for (int64_t i = 0; i < d; ++i) {
      sum += std::fabs(q[i]);
      rounding += std::fabs(q[i] * centre[i]);
      whole += static_cast<int8_t>(bytes[t * width + i]);
    }
    scale = std::max(scale, 1e-30f);  // of a query of zeros
    x.inverse = 1.0f / scale;
    x.shift = dot(q, centre.data(), d) + 1e-5f * rounding;
    x.least = -INF;
    x.start = static_cast<int32_t>(std::ceil(SLACK * sum / (2.0f * scale))) - 128 * whole;
  }

  std::vector<uint8_t> storage(BLOCK * width * ROWS + 64);
  uint8_t* tiles = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(storage.data()) + 63) / 64 * 64);
  std::vector<float> scales(BLOCK * ROWS), halves(BLOCK * ROWS);  // sk, and sk * |b|_1 / 2
  std::vector<uint8_t> line(width);

  for (int64_t s = 0; s < n_spans; ++s) {
    for (int64_t first = spans[2 * s]; first < spans[2 * s + 1]; first += BLOCK * ROWS) {
      const int64_t rows = std::min(BLOCK * ROWS, spans[2 * s + 1] - first);
      const int64_t used = (rows + ROWS - 1) / ROWS, whole = (used + TILES - 1) / TILES * TILES;
      for (int64_t row = 0; row < whole * ROWS; ++row) {
        int32_t amounts = 0;
        scales[row] = 0.0f;
        halves[row] = NAN;  // compares false: never found
        if (row < rows && quantize(table + (first + row) * d, centre.data(), d, width, 128, line.data(), &scales[row],
                                   &amounts)) {
          halves[row] = SLACK * scales[row] * static_cast<float>(amounts) / 2.0f;
          uint8_t* to = tiles + row / ROWS * width * ROWS + row % ROWS * 4;
          for (int64_t g = 0; g < groups; ++g) std::memcpy(to + g * ROWS * 4, &line[g * 4], 4);
        }
      }
      for (int64_t t = 0; t < padded; t += QUERIES) {
        for (int64_t tile = 0; tile < whole; tile += TILES) {
          unsigned may[QUERIES][TILES];  // rows of each tile that may be among the best, as bits
          {
            // All loops are unrolled, so that the sums stay in registers.
            __m512i sums[QUERIES][TILES];
#pragma GCC unroll 4
            for (int i = 0; i < QUERIES; ++i)
#pragma GCC unroll 4
              for (int j = 0; j < TILES; ++j) sums[i][j] = _mm512_set1_epi32(about[t + i].start);
            for (int64_t g = 0; g < groups; ++g) {
              __m512i four[TILES];
#pragma GCC unroll 4
              for (int j = 0; j < TILES; ++j)
                four[j] = _mm512_load_si512(tiles + ((tile + j) * groups + g) * 64);
#pragma GCC unroll 4
              for (int i = 0; i < QUERIES; ++i) {
                int32_t x;
                std::memcpy(&x, &bytes[(t + i) * width + g * 4], 4);
                const __m512i same = _mm512_set1_epi32(x);
#pragma GCC unroll 4
                for (int j = 0; j < TILES; ++j) sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], four[j], same);
              }
            }
#pragma GCC unroll 4
            for (int i = 0; i < QUERIES; ++i) {
              const Query& x = about[t + i];
              const __m512 least = _mm512_set1_ps((x.least - x.shift) * x.inverse);
#pragma GCC unroll 4
              for (int j = 0; j < TILES; ++j) {
                const __m512 sk = _mm512_loadu_ps(&scales[(tile + j) * ROWS]);
                const __m512 bound = _mm512_loadu_ps(&halves[(tile + j) * ROWS]);
                // No true score is above q . centre and sq times this.
                const __m512 most = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i][j]), sk, bound);
                may[i][j] = _mm512_cmp_ps_mask(most, least, _CMP_GE_OQ);
              }
            }
          }
          for (int i = 0; i < QUERIES; ++i) {
            for (int j = 0; j < TILES; ++j) {
              for (; may[i][j]; may[i][j] &= may[i][j] - 1) {
                const int64_t row = first + (tile + j) * ROWS + __builtin_ctz(may[i][j]);
                const float score = dot(queries + (t + i) * d, table + row * d, d);
                float& least = about[t + i].least;
                if (score > least) {
                  const int64_t at = (t + i) * room;
                  least = replace_lowest(score, row, room, least, &scores[at], &best[at]);
                }
              }
            }
          }
        }
      }
    }
  }

  std::vector<int64_t> order(n);
  for (int64_t t = 0; t < T; ++t) {
    const float* score = &scores[t * room];
    const int64_t* row = &best[t * room];
    std::iota(order.begin(), order.end(), int64_t{0});
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return score[a] != score[b] ? score[a] > score[b] : static_cast<uint64_t>(row[a]) < static_cast<uint64_t>(row[b]);
    });
    for (int64_t i = 0; i < n; ++i) found[t * n + i] = row[order[i]];
  }
}
