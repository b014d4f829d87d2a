// Search of one head: the rows of a table, or of those lists of an inverted file that a query is to look into, with the
// largest inner products with each query.
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

// The best rows of some queries so far.
class Search {
 public:
  Search(const float* queries, int64_t T, int64_t d, int64_t n);

  // Look among rows of a table, numbered from `first`, or by `names`, for what `count` of the queries look for.
  void scan(const float* table, int64_t rows, int64_t first, const int64_t* names, const int32_t* asking, int64_t count);

  // The numbers of the best rows of each query, best first, (T, n); -1 where there are none.
  void finish(int64_t* found) const;

 private:
  const float* queries_;
  const int64_t T_, d_, n_;
  const int64_t width_;  // d in whole registers of 16
  const int64_t room_;   // n likewise
  // Of each query, and of one behind them that finds nothing.
  std::vector<uint8_t> bytes_;   // a
  std::vector<float> inverse_;   // 1 / sq
  std::vector<float> least_;     // score of the n-th best row so far; -inf while there are fewer, inf: finds nothing
  std::vector<int32_t> start_;   // |q|_1 / (2 sq), and takes the rows' offset of 128 back
  std::vector<float> scores_;    // of the best rows, (T, room)
  std::vector<int64_t> best_;    // their numbers
  // Of the rows that are scanned.
  std::vector<float> centre_, shift_, scales_, halves_;  // shift: q . centre; halves: sk * |b|_1 / 2
  std::vector<int32_t> asking_;
  std::vector<uint8_t> line_, storage_;
  uint8_t* tiles_;
};

Search::Search(const float* queries, int64_t T, int64_t d, int64_t n)
    : queries_(queries), T_(T), d_(d), n_(n), width_((d + 15) / 16 * 16), room_((n + 15) / 16 * 16),
      bytes_((T + 1) * width_, 0), inverse_(T + 1, 0.0f), least_(T + 1, INF), start_(T + 1, 0),
      scores_(T * room_, -INF), best_(T * room_, -1), centre_(d), scales_(BLOCK * ROWS), halves_(BLOCK * ROWS),
      line_(width_), storage_(BLOCK * width_ * ROWS + 64) {
  tiles_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(storage_.data()) + 63) / 64 * 64);
  for (int64_t t = 0; t < T; ++t) {
    std::fill(&scores_[t * room_] + n, &scores_[t * room_] + room_, INF);  // stays
    float scale;
    int32_t amounts, whole = 0;
    const float* q = queries + t * d;
    if (!quantize(q, nullptr, d, width_, 0, &bytes_[t * width_], &scale, &amounts)) continue;
    float sum = 0.0f;
    for (int64_t i = 0; i < d; ++i) {
      sum += std::fabs(q[i]);
      whole += static_cast<int8_t>(bytes_[t * width_ + i]);
    }
    scale = std::max(scale, 1e-30f);  // of a query of zeros
    inverse_[t] = 1.0f / scale;
    start_[t] = static_cast<int32_t>(std::ceil(SLACK * sum / (2.0f * scale))) - 128 * whole;
    least_[t] = -INF;
  }
}

void Search::scan(const float* table, int64_t rows, int64_t first, const int64_t* names, const int32_t* asking,
                  int64_t count) {
  if (rows == 0 || count == 0) return;
  const int64_t d = d_, groups = width_ / 4;
  const int64_t step = std::max<int64_t>(1, rows / SAMPLE);
  std::fill(centre_.begin(), centre_.end(), 0.0f);
  for (int64_t row = 0; row < rows; row += step)
    for (int64_t i = 0; i < d; ++i) centre_[i] += table[row * d + i];
  for (float& x : centre_) {
    x /= (rows + step - 1) / step;
    if (!(std::fabs(x) < INF)) x = 0.0f;
  }
  asking_.assign(asking, asking + count);
  asking_.resize((count + QUERIES - 1) / QUERIES * QUERIES, T_);
  shift_.assign(asking_.size(), 0.0f);
  for (int64_t t = 0; t < count; ++t) {
    const float* q = queries_ + asking_[t] * d;
    // A sum of d products is wrong by less than this.
    const float rounding = 1e-5f * std::sqrt(dot(q, q, d) * dot(centre_.data(), centre_.data(), d));
    shift_[t] = dot(q, centre_.data(), d) + rounding;
  }

  for (int64_t begin = 0; begin < rows; begin += BLOCK * ROWS) {
    const int64_t held = std::min(BLOCK * ROWS, rows - begin);
    const int64_t tiles = ((held + ROWS - 1) / ROWS + TILES - 1) / TILES * TILES;
    for (int64_t row = 0; row < tiles * ROWS; ++row) {
      int32_t amounts = 0;
      scales_[row] = 0.0f;
      halves_[row] = NAN;  // compares false: never found
      if (row < held && quantize(table + (begin + row) * d, centre_.data(), d, width_, 128, line_.data(), &scales_[row],
                                 &amounts)) {
        halves_[row] = SLACK * scales_[row] * static_cast<float>(amounts) / 2.0f;
        uint8_t* to = tiles_ + row / ROWS * width_ * ROWS + row % ROWS * 4;
        for (int64_t g = 0; g < groups; ++g) std::memcpy(to + g * ROWS * 4, &line_[g * 4], 4);
      }
    }
    for (size_t t = 0; t < asking_.size(); t += QUERIES) {
      const int32_t* who = &asking_[t];
      for (int64_t tile = 0; tile < tiles; tile += TILES) {
        unsigned may[QUERIES][TILES];  // rows of each tile that may be among the best, as bits
        {
          // All loops are unrolled, so that the sums stay in registers.
          __m512i sums[QUERIES][TILES];
#pragma GCC unroll 4
          for (int i = 0; i < QUERIES; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < TILES; ++j) sums[i][j] = _mm512_set1_epi32(start_[who[i]]);
          const uint8_t* bytes[QUERIES];
#pragma GCC unroll 4
          for (int i = 0; i < QUERIES; ++i) bytes[i] = &bytes_[who[i] * width_];
          for (int64_t g = 0; g < groups; ++g) {
            __m512i four[TILES];
#pragma GCC unroll 4
            for (int j = 0; j < TILES; ++j) four[j] = _mm512_load_si512(tiles_ + ((tile + j) * groups + g) * 64);
#pragma GCC unroll 4
            for (int i = 0; i < QUERIES; ++i) {
              int32_t x;
              std::memcpy(&x, bytes[i] + g * 4, 4);
              const __m512i same = _mm512_set1_epi32(x);
#pragma GCC unroll 4
              for (int j = 0; j < TILES; ++j) sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], four[j], same);
            }
          }
#pragma GCC unroll 4
          for (int i = 0; i < QUERIES; ++i) {
            const __m512 least = _mm512_set1_ps((least_[who[i]] - shift_[t + i]) * inverse_[who[i]]);
#pragma GCC unroll 4
            for (int j = 0; j < TILES; ++j) {
              const __m512 sk = _mm512_loadu_ps(&scales_[(tile + j) * ROWS]);
              const __m512 bound = _mm512_loadu_ps(&halves_[(tile + j) * ROWS]);
              // No true score is above q . centre and sq times this.
              const __m512 most = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i][j]), sk, bound);
              may[i][j] = _mm512_cmp_ps_mask(most, least, _CMP_GE_OQ);
            }
          }
        }
        for (int i = 0; i < QUERIES; ++i) {
          const int64_t query = who[i];
          for (int j = 0; j < TILES; ++j) {
            for (; may[i][j]; may[i][j] &= may[i][j] - 1) {
              const int64_t row = begin + (tile + j) * ROWS + __builtin_ctz(may[i][j]);
              const float score = dot(queries_ + query * d, table + row * d, d);
              float& least = least_[query];
              if (score > least) {
                const int64_t number = names ? names[row] : first + row;
                least = replace_lowest(score, number, room_, least, &scores_[query * room_], &best_[query * room_]);
              }
            }
          }
        }
      }
    }
  }
}

void Search::finish(int64_t* found) const {
  std::vector<int64_t> order(n_);
  for (int64_t t = 0; t < T_; ++t) {
    const float* score = &scores_[t * room_];
    const int64_t* row = &best_[t * room_];
    std::iota(order.begin(), order.end(), int64_t{0});
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return score[a] != score[b] ? score[a] > score[b] : static_cast<uint64_t>(row[a]) < static_cast<uint64_t>(row[b]);
    });
    for (int64_t i = 0; i < n_; ++i) found[t * n_ + i] = row[order[i]];
  }
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
  Search search(queries, T, d, n);
  std::vector<int32_t> all(T);
  std::iota(all.begin(), all.end(), 0);
  for (int64_t s = 0; s < n_spans; ++s) {
    const int64_t begin = spans[2 * s];
    search.scan(table + begin * d, spans[2 * s + 1] - begin, begin, nullptr, all.data(), T);
  }
  search.finish(found);
}

// The same among lists of rows: list l has sizes[l] rows at tables[l], called names[l], and each query looks into its
// lists of `probes` (T, n_probes), each once; -1 for none.
extern "C" void longmem_search_lists(const float* queries, int64_t T, int64_t d, const float* const* tables,
                                     const int64_t* const* names, const int64_t* sizes, int64_t n_lists,
                                     const int64_t* probes, int64_t n_probes, int64_t n, int64_t* found) {
  // The queries that look into each list, list by list.
  std::vector<int64_t> ends(n_lists + 1, 0);
  for (int64_t i = 0; i < T * n_probes; ++i)
    if (probes[i] >= 0) ++ends[probes[i] + 1];
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  std::vector<int64_t> next(ends.begin(), ends.end() - 1);
  std::vector<int32_t> asking(ends[n_lists]);
  for (int64_t i = 0; i < T * n_probes; ++i)
    if (probes[i] >= 0) asking[next[probes[i]]++] = static_cast<int32_t>(i / n_probes);

  Search search(queries, T, d, n);
  for (int64_t list = 0; list < n_lists; ++list)
    search.scan(tables[list], sizes[list], 0, names[list], asking.data() + ends[list], ends[list + 1] - ends[list]);
  search.finish(found);
}
