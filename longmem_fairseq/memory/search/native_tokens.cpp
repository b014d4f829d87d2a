// Search of a token memory: for each query, the n rows with the largest inner products among the first ones of a table
// in half precision, and these products in float.
//
// A float product of all rows, and the choice of the n best of so many scores, would each take longer than this:
//
// 1. A sample of the rows is scored in 8-bit integers. From it comes a bar for each query that about a third more than n
//    rows reach.
// 2. Rows whose 8-bit product, with its bound, may reach the bar (see native_search.cpp) are compared in float while
//    their block is in a cache. Those that reach it are kept.
// 3. The n best of these are chosen. Where fewer than n were kept, the bar was too high: all rows of that query are
//    compared in float.
//
// So the sample decides about the time only. Few queries are compared with all rows in float from the start.
//
// Legend: T queries, d width, n rows to find.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "native_quantized.h"

namespace {

constexpr int64_t FEW = 8;                // fewer queries: it does not pay to convert the rows to integers
constexpr int64_t AT_ONCE = 64;           // queries that are compared with all rows together, and stay in a cache
constexpr int64_t BLOCK_BYTES = 1 << 16;  // of the integers of a block of rows
constexpr int64_t SAMPLED = 4096;         // about as many rows are scored to set the bars
constexpr double DEVIATIONS = 3.5;        // of the number of rows of a sample that are above a score
constexpr float NONE = -std::numeric_limits<float>::infinity();

// Rows one after the other in several pieces, in half precision.
class Table {
 public:
  Table(const uint16_t* const* pieces, const int64_t* sizes, int64_t count, int64_t d) : d_(d) {
    for (int64_t i = 0; i < count; ++i) {
      pieces_.push_back(pieces[i]);
      ends_.push_back(size() + sizes[i]);
    }
  }

  int64_t size() const { return ends_.empty() ? 0 : ends_.back(); }
  const uint16_t* row(int64_t i) const {
    size_t piece = 0;
    while (i >= ends_[piece]) ++piece;
    return pieces_[piece] + (i - (piece ? ends_[piece - 1] : 0)) * d_;
  }

 private:
  const int64_t d_;
  std::vector<const uint16_t*> pieces_;
  std::vector<int64_t> ends_;
};

// Rows that reach a query's bar, in the order of the table; when there is no room for more, only the n best are kept.
class Kept {
 public:
  float bar = NONE;

  void add(float score, int64_t row, int64_t n) {
    if (!(score >= bar && std::fabs(score) < INFINITY)) return;
    entries_.push_back({score, static_cast<uint32_t>(row)});
    if (size() < 2 * n + 1024) return;
    choose(n);
    bar = std::min_element(entries_.begin(), entries_.end(), lower)->score;
  }

  int64_t size() const { return entries_.size(); }

  void clear() {
    entries_.clear();
    bar = NONE;
  }

  // Drops all but the n best rows; of equal ones the first are kept.
  void choose(int64_t n) {
    if (size() <= n) return;
    std::vector<float> scores(entries_.size());
    std::transform(entries_.begin(), entries_.end(), scores.begin(), [](const Entry& x) { return x.score; });
    std::nth_element(scores.begin(), scores.begin() + (n - 1), scores.end(), std::greater<float>());
    const float least = scores[n - 1];
    int64_t equal = n - std::count_if(scores.begin(), scores.end(), [&](float x) { return x > least; });
    const auto worse = [&](const Entry& x) { return x.score < least || (x.score == least && equal-- <= 0); };
    size_t to = 0;
    for (const Entry& entry : entries_)
      if (!worse(entry)) entries_[to++] = entry;
    entries_.resize(to);
  }

  void write(int64_t n, float* scores, int64_t* rows) const {
    for (int64_t i = 0; i < n; ++i) {
      scores[i] = i < size() ? entries_[i].score : NONE;
      rows[i] = i < size() ? static_cast<int64_t>(entries_[i].row) : -1;
    }
  }

 private:
  struct Entry {
    float score;
    uint32_t row;
  };

  static bool lower(const Entry& a, const Entry& b) { return a.score < b.score; }

  std::vector<Entry> entries_;
};

class TokenSearch {
 public:
  TokenSearch(const Instructions& with, const float* queries, int64_t T, int64_t d, const Table& table,
              const int64_t* readable, int64_t n)
      : with_(with), floats_(queries), T_(T), d_(d), n_(n), table_(table), readable_(readable), kept_(T),
        line_(d), norm_(T) {
    for (int64_t t = 0; t < T; ++t) {
      double sum = 0.0;
      for (int64_t i = 0; i < d; ++i) sum += static_cast<double>(query(t)[i]) * query(t)[i];
      norm_[t] = std::sqrt(sum);
    }
  }

  void run(float* scores, int64_t* rows) {
    if (T_ >= FEW && *std::min_element(readable_, readable_ + T_) > 2 * n_) {
      scan_in_integers();
    } else {
      for (int64_t t = 0; t < T_; t += AT_ONCE) scan(t, std::min(t + AT_ONCE, T_));
    }
    for (int64_t t = 0; t < T_; ++t) {
      if (kept_[t].size() < std::min(n_, readable_[t]) && kept_[t].bar > NONE) {
        kept_[t].clear();
        scan(t, t + 1);
      }
      kept_[t].choose(n_);
      kept_[t].write(n_, scores + t * n_, rows + t * n_);
    }
  }

 private:
  const float* query(int64_t t) const { return floats_ + t * d_; }

  void compare(int64_t t, int64_t number, const uint16_t* row) {
    if (number < readable_[t]) kept_[t].add(with_.dot_halves(query(t), row, d_), number, n_);
  }

  // Compares some queries with all rows in float.
  void scan(int64_t begin, int64_t end) {
    const int64_t rows = *std::max_element(readable_ + begin, readable_ + end);
    for (int64_t i = 0; i < rows; ++i) {
      const uint16_t* row = table_.row(i);
      for (int64_t t = begin; t < end; ++t) compare(t, i, row);
    }
  }

  const float* widened(int64_t i) {
    with_.widen(table_.row(i), d_, line_.data());
    return line_.data();
  }

  void scan_in_integers();
  void set_bars(const QuantizedQueries& queries, QuantizedRows& rows, const std::vector<double>& shift);

  const Instructions& with_;
  const float* floats_;
  const int64_t T_, d_, n_;
  const Table& table_;
  const int64_t* readable_;  // number of rows that each query can find: the first ones
  std::vector<Kept> kept_;
  std::vector<float> line_;
  std::vector<double> norm_;  // length of each query
};

// Sets the bars from a sample of the rows that all queries can find.
void TokenSearch::set_bars(const QuantizedQueries& queries, QuantizedRows& rows, const std::vector<double>& shift) {
  const int64_t common = *std::min_element(readable_, readable_ + T_);
  const int64_t step = std::max<int64_t>(1, common / SAMPLED), sampled = (common + step - 1) / step;
  const double expected = static_cast<double>(n_) * sampled / common;
  const int64_t rank = static_cast<int64_t>(expected + DEVIATIONS * std::sqrt(expected));  // counted from 0
  if (rank >= sampled) return;
  const int64_t most = rounded_up(std::max<int64_t>(rows.together(), BLOCK_BYTES / d_), rows.together());
  std::vector<float> scores(T_ * sampled), of_tiles(QUERIES * rows.together());
  const int8_t* integers[QUERIES];
  int32_t offsets[QUERIES];
  for (int64_t begin = 0; begin < sampled; begin += most) {
    const int64_t held = std::min(most, sampled - begin);
    rows.fill(held, [&](int64_t i) { return widened((begin + i) * step); });
    for (int64_t t = 0; t < T_; t += QUERIES) {
      for (int64_t i = 0; i < QUERIES; ++i) {
        integers[i] = queries.integers(std::min(t + i, T_));
        offsets[i] = queries.offset(std::min(t + i, T_));
      }
      for (int64_t row = 0; row < rows.filled(); row += rows.together()) {
        rows.scores(row, integers, offsets, of_tiles.data());
        for (int64_t i = 0; i < std::min(QUERIES, T_ - t); ++i)
          std::copy_n(&of_tiles[i * rows.together()], std::min(rows.together(), held - row),
                      &scores[(t + i) * sampled + begin + row]);
      }
    }
  }
  for (int64_t t = 0; t < T_; ++t) {
    float* of_query = &scores[t * sampled];
    std::nth_element(of_query, of_query + rank, of_query + sampled, std::greater<float>());
    const double bar = of_query[rank] / queries.inverse(t) + shift[t];
    if (std::fabs(bar) < INF) kept_[t].bar = static_cast<float>(bar);
  }
}

void TokenSearch::scan_in_integers() {
  const QuantizedQueries queries(with_, floats_, T_, d_);
  const int64_t together = with_.rows * with_.tiles;
  const int64_t block = rounded_up(std::max<int64_t>(together, BLOCK_BYTES / d_), together);
  const int64_t total = *std::max_element(readable_, readable_ + T_);
  QuantizedRows rows(with_, d_, block);
  rows.set_center(total, [&](int64_t i) { return widened(i); });
  std::vector<double> shift(T_);
  for (int64_t t = 0; t < T_; ++t) shift[t] = queries.shift(t, rows.center());
  set_bars(queries, rows, shift);

  const int8_t* integers[QUERIES];
  int32_t starts[QUERIES];
  float bars[QUERIES];
  uint64_t candidates[QUERIES];
  for (int64_t begin = 0; begin < total; begin += block) {
    rows.fill(std::min(block, total - begin), [&](int64_t i) { return widened(begin + i); });
    for (int64_t t = 0; t < T_; t += QUERIES) {
      for (int64_t i = 0; i < QUERIES; ++i) {
        const int64_t at = std::min(t + i, T_);
        integers[i] = queries.integers(at);
        starts[i] = queries.start(at);
        // A sum of floats may be larger than the product by this, for rows of length 1.
        bars[i] = at < T_ ? queries.bar(at, kept_[at].bar - 1e-7 * d_ * norm_[at], shift[at]) : NAN;
      }
      for (int64_t row = 0; row < rows.filled(); row += together) {
        rows.candidates(row, integers, starts, bars, candidates);
        for (int64_t i = 0; i < QUERIES; ++i) {
          for (uint64_t left = candidates[i]; left; left &= left - 1) {
            const int64_t found = begin + row + __builtin_ctzll(left);
            compare(t + i, found, table_.row(found));
          }
        }
      }
    }
  }
}

}  // namespace

// Finds for each query (T, d) the n best of the first readable[t] >= 1 rows of a table in half precision, whose rows are
// in `pieces` one after the other, `sizes` rows each. Writes their products to `scores` (T, n) and their numbers to
// `rows` (T, n), in the order of the table; of equal ones the first are found. Where there are fewer, the rest is -inf
// and -1. A query that is not finite finds nothing, and a row that is not finite is not found.
extern "C" void longmem_search_tokens(int64_t version, const float* queries, int64_t T, int64_t d,
                                      const uint16_t* const* pieces, const int64_t* sizes, int64_t n_pieces,
                                      const int64_t* readable, int64_t n, float* scores, int64_t* rows) {
  const DefaultRounding rounding;
  const Table table(pieces, sizes, n_pieces, d);
  TokenSearch(*VERSIONS[version], queries, T, d, table, readable, n).run(scores, rows);
}
