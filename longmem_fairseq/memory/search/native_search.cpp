// Search of one head: for each query, the n rows of a table with the largest inner products, or the n rows of those
// lists of an inverted file that the query probes.
//
// All products are first computed in 8-bit integers, four times as fast as in float. The error of such a product has a
// known bound, so only rows that may be among the n best are compared in float. The result is exact; the number of
// products that are computed twice, and so the time, depends on the data.
//
// With q = sq * a + dq and k = sk * b + dk, where a and b are integers between -127 and 127 and each |dq| <= sq / 2 and
// |dk| <= sk / 2:    |q . k - sq * sk * (a . b)|  <=  sk / 2 * |q|_1  +  sq / 2 * sk * |b|_1,
// so that    q . k / sq  <=  sk * (a . b + |q|_1 / (2 sq)) + sk * |b|_1 / 2,    where all but a . b is known before.
// A center is subtracted from the rows before they are quantized: what all rows have in common would use bits without
// changing the ranking.
//
// Legend: T queries, d width of a head, n rows to find.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace {

constexpr int64_t ROWS = 16;      // rows of a tile: a register holds one 32-bit sum of each
constexpr int64_t TILES = 4;      // tiles, and
constexpr int64_t QUERIES = 4;    // queries, whose sums are computed together: 16 of 32 registers
constexpr int64_t BLOCK = 16;     // tiles that are quantized at a time and stay in the first-level cache
constexpr int64_t SAMPLE = 256;   // about as many rows are averaged to the center
constexpr int64_t WIDEST = 1024;  // largest d: 127 * 127 * 1024 is exact in a float
constexpr float SLACK = 1.01f;    // factor on bounds, for rounding
constexpr float INF = std::numeric_limits<float>::infinity();

// A mask of the first `count` of 16 lanes.
__mmask16 lanes(int64_t count) { return count >= 16 ? 0xFFFF : count > 0 ? (1u << count) - 1 : 0; }

float dot(const float* x, const float* y, int64_t d) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < d; i += 16) {
    const __mmask16 in = lanes(d - i);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(in, x + i), _mm512_maskz_loadu_ps(in, y + i), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

// Quantizes x minus the center (null for no center) to integers between -127 and 127, and writes them plus an offset to
// `width` bytes; those from d on are zero plus the offset. Also returns their scale and the sum of their magnitudes.
// Returns false if x is not finite.
bool quantize(const float* x, const float* center, int64_t d, int64_t width, int offset, uint8_t* out, float* scale,
              int32_t* magnitudes) {
  alignas(64) float centered[WIDEST];
  __m512 largest = _mm512_setzero_ps();
  __mmask16 finite = 0xFFFF;
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 in = lanes(d - i);
    __m512 y = _mm512_maskz_loadu_ps(in, x + i);
    if (center) y = _mm512_sub_ps(y, _mm512_maskz_loadu_ps(in, center + i));
    _mm512_store_ps(centered + i, y);
    y = _mm512_abs_ps(y);
    finite &= _mm512_cmp_ps_mask(y, _mm512_set1_ps(INF), _CMP_LT_OQ);
    largest = _mm512_max_ps(largest, y);
  }
  if (finite != 0xFFFF) return false;
  const float most = _mm512_reduce_max_ps(largest);
  const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
  *scale = inverse > 0.0f ? most / 127.0f : 2.0f * most;  // the bound also holds where all integers are 0
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < width; i += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(centered + i), _mm512_set1_ps(inverse)));
    sum = _mm512_add_epi32(sum, _mm512_abs_epi32(whole));
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(offset)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), bytes);
  }
  *magnitudes = _mm512_reduce_add_epi32(sum);
  return true;
}

// Replaces the lowest of `room` scores (a multiple of 16) and its row, and returns the new lowest score. There is no
// branch that depends on the scores, which would often be mispredicted.
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

// The best rows of each query among the rows scanned so far.
class Search {
 public:
  Search(const float* queries, int64_t T, int64_t d, int64_t n);

  // Scans the rows of a table for `count` of the queries. The id of a row is in `ids`; where that is null, it is the
  // row's number, counted from `first`.
  void scan(const float* table, int64_t rows, int64_t first, const int64_t* ids, const int32_t* queries, int64_t count);

  // Writes the ids of the best rows of each query, best first, (T, n); -1 where there are fewer rows.
  void finish(int64_t* ids) const;

 private:
  const float* queries_;
  const int64_t T_, d_, n_;
  const int64_t width_;  // d, rounded up to a multiple of 16
  const int64_t room_;   // n, rounded up to a multiple of 16
  // Of each query, and of one more that finds nothing.
  std::vector<uint8_t> bytes_;   // a
  std::vector<float> inverse_;   // 1 / sq
  std::vector<float> least_;     // score of the n-th best row so far; -inf while there are fewer; inf finds nothing
  std::vector<int32_t> start_;   // |q|_1 / (2 sq), minus what the rows' offset of 128 adds
  std::vector<float> scores_;    // scores of the best rows, (T, room)
  std::vector<int64_t> best_;    // ids of the best rows, (T, room)
  // Of one scan.
  std::vector<float> center_, shift_, scales_, halves_;  // shift: q . center; halves: sk * |b|_1 / 2
  std::vector<int32_t> scanning_;  // the queries, filled up to a multiple of QUERIES
  std::vector<uint8_t> line_, storage_;
  uint8_t* tiles_;
};

Search::Search(const float* queries, int64_t T, int64_t d, int64_t n)
    : queries_(queries), T_(T), d_(d), n_(n), width_((d + 15) / 16 * 16), room_((n + 15) / 16 * 16),
      bytes_((T + 1) * width_, 0), inverse_(T + 1, 0.0f), least_(T + 1, INF), start_(T + 1, 0),
      scores_(T * room_, -INF), best_(T * room_, -1), center_(d), scales_(BLOCK * ROWS), halves_(BLOCK * ROWS),
      line_(width_), storage_(BLOCK * width_ * ROWS + 64) {
  tiles_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(storage_.data()) + 63) / 64 * 64);
  for (int64_t t = 0; t < T; ++t) {
    std::fill(&scores_[t * room_] + n, &scores_[t * room_] + room_, INF);  // never replaced
    float scale;
    int32_t magnitudes, integers = 0;
    const float* q = queries + t * d;
    if (!quantize(q, nullptr, d, width_, 0, &bytes_[t * width_], &scale, &magnitudes)) continue;
    float sum = 0.0f;
    for (int64_t i = 0; i < d; ++i) {
      sum += std::fabs(q[i]);
      integers += static_cast<int8_t>(bytes_[t * width_ + i]);
    }
    scale = std::max(scale, 1e-30f);  // for a query of zeros
    inverse_[t] = 1.0f / scale;
    start_[t] = static_cast<int32_t>(std::ceil(SLACK * sum / (2.0f * scale))) - 128 * integers;
    least_[t] = -INF;
  }
}

void Search::scan(const float* table, int64_t rows, int64_t first, const int64_t* ids, const int32_t* queries,
                  int64_t count) {
  if (rows == 0 || count == 0) return;
  const int64_t d = d_, groups = width_ / 4;
  const int64_t step = std::max<int64_t>(1, rows / SAMPLE);
  std::fill(center_.begin(), center_.end(), 0.0f);
  for (int64_t row = 0; row < rows; row += step)
    for (int64_t i = 0; i < d; ++i) center_[i] += table[row * d + i];
  for (float& x : center_) {
    x /= (rows + step - 1) / step;
    if (!(std::fabs(x) < INF)) x = 0.0f;
  }
  scanning_.assign(queries, queries + count);
  scanning_.resize((count + QUERIES - 1) / QUERIES * QUERIES, T_);
  shift_.assign(scanning_.size(), 0.0f);
  for (int64_t t = 0; t < count; ++t) {
    const float* q = queries_ + scanning_[t] * d;
    // The rounding error of a sum of d products is less than this.
    const float rounding = 1e-5f * std::sqrt(dot(q, q, d) * dot(center_.data(), center_.data(), d));
    shift_[t] = dot(q, center_.data(), d) + rounding;
  }

  for (int64_t begin = 0; begin < rows; begin += BLOCK * ROWS) {
    const int64_t held = std::min(BLOCK * ROWS, rows - begin);
    const int64_t tiles = ((held + ROWS - 1) / ROWS + TILES - 1) / TILES * TILES;
    for (int64_t row = 0; row < tiles * ROWS; ++row) {
      int32_t magnitudes = 0;
      scales_[row] = 0.0f;
      halves_[row] = NAN;  // compares false, so the row is never a candidate
      if (row < held && quantize(table + (begin + row) * d, center_.data(), d, width_, 128, line_.data(), &scales_[row],
                                 &magnitudes)) {
        halves_[row] = SLACK * scales_[row] * static_cast<float>(magnitudes) / 2.0f;
        uint8_t* to = tiles_ + row / ROWS * width_ * ROWS + row % ROWS * 4;
        for (int64_t g = 0; g < groups; ++g) std::memcpy(to + g * ROWS * 4, &line_[g * 4], 4);
      }
    }
    for (size_t t = 0; t < scanning_.size(); t += QUERIES) {
      const int32_t* group = &scanning_[t];
      for (int64_t tile = 0; tile < tiles; tile += TILES) {
        unsigned candidates[QUERIES][TILES];  // rows of each tile that may be among the best, as bits
        {
          // All loops are unrolled, so that the sums stay in registers.
          __m512i sums[QUERIES][TILES];
#pragma GCC unroll 4
          for (int i = 0; i < QUERIES; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < TILES; ++j) sums[i][j] = _mm512_set1_epi32(start_[group[i]]);
          const uint8_t* bytes[QUERIES];
#pragma GCC unroll 4
          for (int i = 0; i < QUERIES; ++i) bytes[i] = &bytes_[group[i] * width_];
          for (int64_t g = 0; g < groups; ++g) {
            __m512i four[TILES];
#pragma GCC unroll 4
            for (int j = 0; j < TILES; ++j) four[j] = _mm512_load_si512(tiles_ + ((tile + j) * groups + g) * 64);
#pragma GCC unroll 4
            for (int i = 0; i < QUERIES; ++i) {
              int32_t x;
              std::memcpy(&x, bytes[i] + g * 4, 4);
              const __m512i repeated = _mm512_set1_epi32(x);
#pragma GCC unroll 4
              for (int j = 0; j < TILES; ++j) sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], four[j], repeated);
            }
          }
#pragma GCC unroll 4
          for (int i = 0; i < QUERIES; ++i) {
            const __m512 least = _mm512_set1_ps((least_[group[i]] - shift_[t + i]) * inverse_[group[i]]);
#pragma GCC unroll 4
            for (int j = 0; j < TILES; ++j) {
              const __m512 sk = _mm512_loadu_ps(&scales_[(tile + j) * ROWS]);
              const __m512 bound = _mm512_loadu_ps(&halves_[(tile + j) * ROWS]);
              // No true score is above q . center + sq * most.
              const __m512 most = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i][j]), sk, bound);
              candidates[i][j] = _mm512_cmp_ps_mask(most, least, _CMP_GE_OQ);
            }
          }
        }
        for (int i = 0; i < QUERIES; ++i) {
          const int64_t query = group[i];
          for (int j = 0; j < TILES; ++j) {
            for (; candidates[i][j]; candidates[i][j] &= candidates[i][j] - 1) {
              const int64_t row = begin + (tile + j) * ROWS + __builtin_ctz(candidates[i][j]);
              const float score = dot(queries_ + query * d, table + row * d, d);
              float& least = least_[query];
              if (score > least) {
                const int64_t id = ids ? ids[row] : first + row;
                least = replace_lowest(score, id, room_, least, &scores_[query * room_], &best_[query * room_]);
              }
            }
          }
        }
      }
    }
  }
}

void Search::finish(int64_t* ids) const {
  std::vector<int64_t> order(n_);
  for (int64_t t = 0; t < T_; ++t) {
    const float* score = &scores_[t * room_];
    const int64_t* row = &best_[t * room_];
    std::iota(order.begin(), order.end(), int64_t{0});
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return score[a] != score[b] ? score[a] > score[b] : static_cast<uint64_t>(row[a]) < static_cast<uint64_t>(row[b]);
    });
    for (int64_t i = 0; i < n_; ++i) ids[t * n_ + i] = row[order[i]];
  }
}

}  // namespace

// Returns whether this processor has the instructions of this file.
extern "C" int longmem_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

// Searches those rows of a table of width d <= 1024 whose numbers are in `spans` (begin, end, begin, end...), for queries
// (T, d). Writes the numbers of each query's n best rows, best first, to `best` (T, n); -1 where there are fewer.
// A query that is not finite finds nothing, and a row that is not finite is not found.
extern "C" void longmem_search(const float* queries, int64_t T, const float* table, int64_t d, const int64_t* spans,
                               int64_t n_spans, int64_t n, int64_t* best) {
  Search search(queries, T, d, n);
  std::vector<int32_t> all(T);
  std::iota(all.begin(), all.end(), 0);
  for (int64_t s = 0; s < n_spans; ++s) {
    const int64_t begin = spans[2 * s];
    search.scan(table + begin * d, spans[2 * s + 1] - begin, begin, nullptr, all.data(), T);
  }
  search.finish(best);
}

// Searches lists of rows in the same way: list l has sizes[l] rows at tables[l], whose ids are at ids[l]. Each query
// searches its lists of `probes` (T, n_probes), which are all different; -1 for no list.
extern "C" void longmem_search_lists(const float* queries, int64_t T, int64_t d, const float* const* tables,
                                     const int64_t* const* ids, const int64_t* sizes, int64_t n_lists,
                                     const int64_t* probes, int64_t n_probes, int64_t n, int64_t* best) {
  // The queries that probe each list, list by list.
  std::vector<int64_t> ends(n_lists + 1, 0);
  for (int64_t i = 0; i < T * n_probes; ++i)
    if (probes[i] >= 0) ++ends[probes[i] + 1];
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  std::vector<int64_t> next(ends.begin(), ends.end() - 1);
  std::vector<int32_t> probing(ends[n_lists]);
  for (int64_t i = 0; i < T * n_probes; ++i)
    if (probes[i] >= 0) probing[next[probes[i]]++] = static_cast<int32_t>(i / n_probes);

  Search search(queries, T, d, n);
  for (int64_t list = 0; list < n_lists; ++list)
    search.scan(tables[list], sizes[list], 0, ids[list], probing.data() + ends[list], ends[list + 1] - ends[list]);
  search.finish(best);
}
