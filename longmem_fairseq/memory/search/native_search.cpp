// Search of one head: for each query, the n rows of a table with the largest inner products, or the n rows of those
// lists of an inverted file that the query probes.
//
// All products are first computed in 8-bit integers, four times as fast as in float. The error of such a product has a
// known bound, so only rows that may be among the n best are compared, in double. The result is exact for all finite
// floats; the number of products that are computed twice, and so the time, depends on the data.
//
// With q = sq * a + dq and k = sk * b + dk, where a and b are integers of limited magnitude and each |dq| <= sq / 2 and
// |dk| <= sk / 2:    |q . k - sq * sk * (a . b)|  <=  sk / 2 * |q|_1  +  sq / 2 * sk * |b|_1,
// so that    q . k / sq  <=  sk * (a . b + |q|_1 / (2 sq)) + sk * |b|_1 / 2,    where all but a . b is known before.
// A center is subtracted from the rows before they are quantized: what all rows have in common would use bits without
// changing the ranking.
//
// That bound, one fused product and sum, is compared with a bar: the least score that counts, minus q . center, over sq.
// Floats keep the order of the numbers that are rounded to them, also where they overflow or vanish, so a row is left
// out only if its bound is below the bar. Bars, and all of a query that is not done for each row, are computed in double.
//
// Legend: T queries, d width of a head, n rows to find.

#include <xmmintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "native_search.h"

namespace {

constexpr int64_t BLOCK = 256;   // rows that are quantized at a time and stay in the first-level cache
constexpr int64_t SAMPLE = 256;  // about as many rows are averaged to the center
constexpr double INF = std::numeric_limits<double>::infinity();
constexpr double ROUNDING = 1e-12;  // relative error of a sum of d products in double, at most

const Instructions* const VERSIONS[] = {&AVX512, &AVX2};

int64_t rounded_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// While it exists, floats are rounded to the nearest and not flushed to zero, whatever the caller has set.
class DefaultRounding {
 public:
  DefaultRounding() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultRounding() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
};

// The best rows of each query among the rows scanned so far.
class Search {
 public:
  Search(const Instructions& with, const float* queries, int64_t T, int64_t d, int64_t n);

  // Scans the rows of a table for `count` of the queries. The id of a row is in `ids`; where that is null, it is the
  // row's number, counted from `first`.
  void scan(const float* table, int64_t rows, int64_t first, const int64_t* ids, const int32_t* queries, int64_t count);

  // Writes the ids of the best rows of each query, best first, (T, n); -1 where there are fewer rows.
  void finish(int64_t* ids) const;

 private:
  void quantize_query(int64_t query);
  void set_center(const float* table, int64_t rows);
  void set_bar(int64_t t);
  void compare(int64_t t, int64_t row, const float* key, int64_t id);

  const Instructions& with_;
  const float* queries_;
  const int64_t T_, d_, n_;
  const int64_t width_;  // d, rounded up
  const int64_t room_;   // n, rounded up
  // Of each query, and of one more that finds nothing.
  std::vector<int8_t> integers_;  // a
  std::vector<double> inverse_;   // 1 / sq; infinite for a query of zeros, NaN for one that is not finite
  std::vector<double> least_;     // score of the n-th best row so far; -inf while there are fewer
  std::vector<int32_t> start_;    // |q|_1 / (2 sq), minus what the rows' offset adds
  std::vector<double> scores_;    // scores of the best rows, (T, room)
  std::vector<int64_t> best_;     // ids of the best rows, (T, room)
  // Of one scan.
  std::vector<float> center_, scales_, halves_;
  std::vector<int32_t> scanning_;  // the queries, filled up to a multiple of QUERIES
  std::vector<double> shift_;      // q . center
  std::vector<float> bar_;
  std::vector<uint8_t> line_, storage_;
  uint8_t* tiles_;
};

Search::Search(const Instructions& with, const float* queries, int64_t T, int64_t d, int64_t n)
    : with_(with), queries_(queries), T_(T), d_(d), n_(n), width_(rounded_up(d, MULTIPLE)),
      room_(rounded_up(n, MULTIPLE)), integers_((T + 1) * width_, 0), inverse_(T + 1, NAN), least_(T + 1, -INF),
      start_(T + 1, 0), scores_(T * room_, -INF), best_(T * room_, -1), center_(d), scales_(BLOCK), halves_(BLOCK),
      line_(width_), storage_(BLOCK * width_ + 64) {
  tiles_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(storage_.data()) + 63) / 64 * 64);
  for (int64_t t = 0; t < T; ++t) {
    std::fill(&scores_[t * room_] + n, &scores_[t * room_] + room_, INF);  // never replaced
    quantize_query(t);
  }
}

void Search::quantize_query(int64_t query) {
  const float* q = queries_ + query * d_;
  double most = 0.0, sum = 0.0;
  for (int64_t i = 0; i < d_; ++i) {
    most = std::max<double>(most, std::fabs(q[i]));
    sum += std::fabs(q[i]);
  }
  if (!(sum < INF)) return;  // also where there is a NaN
  inverse_[query] = most > 0.0 ? with_.most_query / most : INF;
  if (most == 0.0) return;
  int32_t total = 0;
  for (int64_t i = 0; i < d_; ++i) {
    const double scaled = q[i] * inverse_[query];
    const int32_t whole = static_cast<int32_t>(scaled + (scaled < 0.0 ? -0.5 : 0.5));
    integers_[query * width_ + i] = static_cast<int8_t>(whole);
    total += whole;
  }
  start_[query] = static_cast<int32_t>(std::ceil(SLACK * sum * inverse_[query] / 2.0)) - with_.offset * total;
}

void Search::set_center(const float* table, int64_t rows) {
  const int64_t step = std::max<int64_t>(1, rows / SAMPLE);
  std::fill(center_.begin(), center_.end(), 0.0f);
  for (int64_t row = 0; row < rows; row += step)
    for (int64_t i = 0; i < d_; ++i) center_[i] += table[row * d_ + i];
  for (float& x : center_) {
    x /= (rows + step - 1) / step;
    if (!(std::fabs(x) < INF)) x = 0.0f;
  }
}

// Sets the bar of one of the queries that are scanned. It is not a number, so that no row reaches it, for a query that
// finds nothing (more): one that is not finite, or one of zeros that has found as many rows as it may.
void Search::set_bar(int64_t t) {
  constexpr double LARGEST = std::numeric_limits<float>::max();
  const int32_t query = scanning_[t];
  const double bar = (least_[query] - shift_[t]) * inverse_[query];
  // Rounded down, if by more than is needed: std::nextafter takes longer.
  bar_[t] = static_cast<float>(bar > LARGEST ? LARGEST : bar - (2e-7 * std::fabs(bar) + 2e-45));
}

void Search::scan(const float* table, int64_t rows, int64_t first, const int64_t* ids, const int32_t* queries,
                  int64_t count) {
  if (rows == 0 || count == 0) return;
  const int64_t groups = width_ / 4, together = with_.rows * with_.tiles;
  set_center(table, rows);
  scanning_.assign(queries, queries + count);
  scanning_.resize(rounded_up(count, QUERIES), T_);
  shift_.assign(scanning_.size(), 0.0);
  bar_.assign(scanning_.size(), NAN);
  for (int64_t t = 0; t < count; ++t) {
    const float* q = queries_ + scanning_[t] * d_;
    double magnitudes = 0.0;
    for (int64_t i = 0; i < d_; ++i) {
      const double product = static_cast<double>(q[i]) * center_[i];
      shift_[t] += product;
      magnitudes += std::fabs(product);
    }
    shift_[t] += ROUNDING * magnitudes;
    set_bar(t);
  }

  const int8_t* integers[QUERIES];
  int32_t starts[QUERIES];
  uint64_t candidates[QUERIES];  // rows that may be among the best, as bits
  for (int64_t begin = 0; begin < rows; begin += BLOCK) {
    const int64_t held = std::min(BLOCK, rows - begin), filled = rounded_up(held, together);
    for (int64_t row = 0; row < filled; ++row) {
      scales_[row] = 0.0f;
      halves_[row] = NAN;  // compares false, so the row is never a candidate
      if (row >= held) continue;
      with_.quantize(table + (begin + row) * d_, center_.data(), d_, width_, line_.data(), &scales_[row], &halves_[row]);
      uint8_t* to = tiles_ + row / with_.rows * width_ * with_.rows + row % with_.rows * 4;
      for (int64_t g = 0; g < groups; ++g) std::memcpy(to + g * with_.rows * 4, &line_[g * 4], 4);
    }
    for (size_t t = 0; t < scanning_.size(); t += QUERIES) {
      for (int64_t i = 0; i < QUERIES; ++i) {
        integers[i] = &integers_[scanning_[t + i] * width_];
        starts[i] = start_[scanning_[t + i]];
      }
      for (int64_t row = 0; row < filled; row += together) {
        with_.candidates(tiles_ + row * width_, groups, integers, starts, &bar_[t], &scales_[row], &halves_[row],
                         candidates);
        for (int64_t i = 0; i < QUERIES; ++i) {
          for (uint64_t left = candidates[i]; left; left &= left - 1) {
            const int64_t found = begin + row + __builtin_ctzll(left);
            compare(t + i, scanning_[t + i], table + found * d_, ids ? ids[found] : first + found);
          }
        }
      }
    }
  }
}

void Search::compare(int64_t t, int64_t query, const float* key, int64_t id) {
  const double score = with_.dot(queries_ + query * d_, key, d_);
  if (!(score > least_[query])) return;
  least_[query] = with_.replace_lowest(score, id, room_, least_[query], &scores_[query * room_], &best_[query * room_]);
  set_bar(t);
}

void Search::finish(int64_t* ids) const {
  std::vector<int64_t> order(n_);
  for (int64_t t = 0; t < T_; ++t) {
    const double* score = &scores_[t * room_];
    const int64_t* row = &best_[t * room_];
    std::iota(order.begin(), order.end(), int64_t{0});
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return score[a] != score[b] ? score[a] > score[b] : static_cast<uint64_t>(row[a]) < static_cast<uint64_t>(row[b]);
    });
    for (int64_t i = 0; i < n_; ++i) ids[t * n_ + i] = row[order[i]];
  }
}

}  // namespace

// Versions are numbered from 0, the fastest first. Returns whether this processor has a version's instructions.
extern "C" int longmem_supported(int64_t version) { return VERSIONS[version]->supported(); }

// Searches those rows of a table of width d <= 1024 whose numbers are in `spans` (begin, end, begin, end...), for queries
// (T, d). Writes the numbers of each query's n best rows, best first, to `best` (T, n); -1 where there are fewer.
// A query that is not finite finds nothing, and a row that is not finite is not found.
extern "C" void longmem_search(int64_t version, const float* queries, int64_t T, const float* table, int64_t d,
                               const int64_t* spans, int64_t n_spans, int64_t n, int64_t* best) {
  const DefaultRounding rounding;
  Search search(*VERSIONS[version], queries, T, d, n);
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
extern "C" void longmem_search_lists(int64_t version, const float* queries, int64_t T, int64_t d,
                                     const float* const* tables, const int64_t* const* ids, const int64_t* sizes,
                                     int64_t n_lists, const int64_t* probes, int64_t n_probes, int64_t n,
                                     int64_t* best) {
  const DefaultRounding rounding;
  // The queries that probe each list, list by list.
  std::vector<int64_t> ends(n_lists + 1, 0);
  for (int64_t i = 0; i < T * n_probes; ++i)
    if (probes[i] >= 0) ++ends[probes[i] + 1];
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  std::vector<int64_t> next(ends.begin(), ends.end() - 1);
  std::vector<int32_t> probing(ends[n_lists]);
  for (int64_t i = 0; i < T * n_probes; ++i)
    if (probes[i] >= 0) probing[next[probes[i]]++] = static_cast<int32_t>(i / n_probes);

  Search search(*VERSIONS[version], queries, T, d, n);
  for (int64_t list = 0; list < n_lists; ++list)
    search.scan(tables[list], sizes[list], 0, ids[list], probing.data() + ends[list], ends[list + 1] - ends[list]);
  search.finish(best);
}
