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

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "native_quantized.h"

const Instructions* const VERSIONS[] = {&AVX512, &AVX2};

namespace {

constexpr int64_t BLOCK = 256;  // rows that are quantized at a time and stay in the first-level cache

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
  void set_bar(int64_t t);
  void compare(int64_t t, const float* key, int64_t id);

  const Instructions& with_;
  const QuantizedQueries queries_;
  const int64_t T_, d_, n_;
  const int64_t room_;          // n, rounded up
  std::vector<double> least_;   // score of the n-th best row of each query so far; -inf while there are fewer
  std::vector<double> scores_;  // scores of the best rows, (T, room)
  std::vector<int64_t> best_;   // ids of the best rows, (T, room)
  // Of one scan.
  QuantizedRows rows_;
  std::vector<int32_t> scanning_;  // the queries, filled up to a multiple of QUERIES
  std::vector<double> shift_;      // q . center
  std::vector<float> bar_;
};

Search::Search(const Instructions& with, const float* queries, int64_t T, int64_t d, int64_t n)
    : with_(with), queries_(with, queries, T, d), T_(T), d_(d), n_(n), room_(rounded_up(n, MULTIPLE)),
      least_(T + 1, -INF), scores_(T * room_, -INF), best_(T * room_, -1), rows_(with, d, BLOCK) {
  for (int64_t t = 0; t < T; ++t)
    std::fill(&scores_[t * room_] + n, &scores_[t * room_] + room_, INF);  // never replaced
}

// Sets the bar of one of the queries that are scanned.
void Search::set_bar(int64_t t) { bar_[t] = queries_.bar(scanning_[t], least_[scanning_[t]], shift_[t]); }

void Search::scan(const float* table, int64_t rows, int64_t first, const int64_t* ids, const int32_t* queries,
                  int64_t count) {
  if (rows == 0 || count == 0) return;
  rows_.set_center(rows, [&](int64_t i) { return table + i * d_; });
  scanning_.assign(queries, queries + count);
  scanning_.resize(rounded_up(count, QUERIES), T_);
  shift_.assign(scanning_.size(), 0.0);
  bar_.assign(scanning_.size(), NAN);
  for (int64_t t = 0; t < count; ++t) {
    shift_[t] = queries_.shift(scanning_[t], rows_.center());
    set_bar(t);
  }

  const int8_t* integers[QUERIES];
  int32_t starts[QUERIES];
  uint64_t candidates[QUERIES];  // rows that may be among the best, as bits
  for (int64_t begin = 0; begin < rows; begin += BLOCK) {
    const int64_t held = std::min(BLOCK, rows - begin);
    rows_.fill(0, held, [&](int64_t i) { return table + (begin + i) * d_; });
    for (size_t t = 0; t < scanning_.size(); t += QUERIES) {
      for (int64_t i = 0; i < QUERIES; ++i) {
        integers[i] = queries_.integers(scanning_[t + i]);
        starts[i] = queries_.start(scanning_[t + i]);
      }
      for (int64_t row = 0; row < held; row += rows_.together()) {
        rows_.candidates(row, integers, starts, &bar_[t], candidates);
        for (int64_t i = 0; i < QUERIES; ++i) {
          for (uint64_t left = candidates[i]; left; left &= left - 1) {
            const int64_t found = begin + row + __builtin_ctzll(left);
            compare(t + i, table + found * d_, ids ? ids[found] : first + found);
          }
        }
      }
    }
  }
}

void Search::compare(int64_t t, const float* key, int64_t id) {
  const int32_t query = scanning_[t];
  const double score = with_.dot(queries_.query(query), key, d_);
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

// Searches those rows of a table of width d <= WIDEST whose numbers are in `spans` (begin, end, begin, end...), for queries
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
