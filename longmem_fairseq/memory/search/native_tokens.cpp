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
#include <memory>
#include <vector>

#include "native_quantized.h"

namespace {

constexpr int64_t FEW = 8;                // fewer queries: it does not pay to convert the rows to integers
constexpr int64_t AT_ONCE = 64;           // queries that are compared with all rows together, and stay in a cache
constexpr int64_t BLOCK_BYTES = 1 << 18;  // of the integers of a block of rows
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

// Returns the number of numbers that are at least `least`.
int64_t count_from(const std::vector<float>& x, float least) {
  int32_t count = 0;
  for (const float value : x) count += value >= least;
  return count;
}

// Returns the number of this rank among finite numbers, counted from 0 for the largest. Counting some times what is above
// a number between the largest and the smallest takes less than std::nth_element, which is left with a few of them.
float nth_largest(std::vector<float>& x, int64_t rank) {
  float low = *std::min_element(x.begin(), x.end()), high = *std::max_element(x.begin(), x.end());
  int64_t above = 0;  // numbers from `high` on, which are left out once there are some
  for (int times = 0; times < 8; ++times) {
    const float middle = low / 2 + high / 2;
    if (!(low < middle && middle < high)) break;
    const int64_t count = count_from(x, middle);
    if (count > rank) {
      low = middle;
    } else {
      high = middle;
      above = count;
    }
  }
  const auto end = std::remove_if(x.begin(), x.end(), [&](float y) { return y < low || (above && y >= high); });
  std::nth_element(x.begin(), x.begin() + (rank - above), end, std::greater<float>());
  return x[rank - above];
}

struct Entry {
  float score;
  uint32_t row;
};

// Rows that reach a query's bar, in the order of the table; when there is no room for more, only the n best are kept.
class Kept {
 public:
  float bar = NONE;

  // Sets the room for entries.
  void place(Entry* entries, int64_t room) {
    entries_ = entries;
    room_ = room;
  }

  void add(float score, int64_t row, int64_t n) {
    if (!(score >= bar && std::fabs(score) < INFINITY)) return;
    entries_[size_++] = {score, static_cast<uint32_t>(row)};
    if (size_ == room_) bar = choose(n);
  }

  int64_t size() const { return size_; }

  void clear() {
    size_ = 0;
    bar = NONE;
  }

  // Drops all but the n best of more than n rows, of equal ones all but the first. Returns the least score left.
  float choose(int64_t n) {
    std::vector<float> scores(size_);
    for (int64_t i = 0; i < size_; ++i) scores[i] = entries_[i].score;
    const float least = nth_largest(scores, n - 1);
    int64_t equal = n;
    for (int64_t i = 0; i < size_; ++i) equal -= entries_[i].score > least;
    int64_t to = 0;
    for (int64_t i = 0; i < size_; ++i) {
      if (entries_[i].score < least || (entries_[i].score == least && equal-- <= 0)) continue;
      entries_[to++] = entries_[i];
    }
    size_ = to;
    return least;
  }

  void write(int64_t n, float* scores, int64_t* rows) const {
    for (int64_t i = 0; i < n; ++i) {
      scores[i] = i < size_ ? entries_[i].score : NONE;
      rows[i] = i < size_ ? static_cast<int64_t>(entries_[i].row) : -1;
    }
  }

 private:
  Entry* entries_ = nullptr;
  int64_t room_ = 0, size_ = 0;
};

// Some rows of a table, with their numbers.
struct Rows {
  static constexpr int64_t MOST = 128;

  void add(int64_t row, const uint16_t* halves) {
    number[count] = row;
    at[count++] = halves;
  }

  int64_t count = 0;
  int64_t number[MOST];
  const uint16_t* at[MOST];
};

// The rows of a table as floats, one at a time.
class Lines {
 public:
  Lines(const Instructions& with, const Table& table, int64_t d) : with_(with), table_(table), line_(d) {}

  const float* widened(int64_t i) {
    with_.widen(table_.row(i), line_.size(), line_.data());
    return line_.data();
  }

 private:
  const Instructions& with_;
  const Table& table_;
  std::vector<float> line_;
};

class TokenSearch {
 public:
  // The rows are quantized in `all`, or else block by block.
  TokenSearch(const Instructions& with, const float* queries, int64_t T, int64_t d, const Table& table,
              const int64_t* readable, int64_t n, const QuantizedRows* all)
      : with_(with), floats_(queries), T_(T), d_(d), n_(n), table_(table), readable_(readable), kept_(T),
        entries_(new Entry[T * (2 * n + 1024)]), lines_(with, table, d), norm_(T), all_(all) {
    for (int64_t t = 0; t < T; ++t) {
      kept_[t].place(&entries_[t * (2 * n + 1024)], 2 * n + 1024);
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
      if (kept_[t].size() > n_) kept_[t].choose(n_);
      kept_[t].write(n_, scores + t * n_, rows + t * n_);
    }
  }

 private:
  const float* query(int64_t t) const { return floats_ + t * d_; }

  // Compares a query with some rows in float.
  void compare(int64_t t, const Rows& rows) {
    float products[Rows::MOST];
    with_.dot_halves(query(t), rows.at, rows.count, d_, products);
    for (int64_t i = 0; i < rows.count; ++i)
      if (rows.number[i] < readable_[t]) kept_[t].add(products[i], rows.number[i], n_);
  }

  void compare_and_clear(int64_t t, Rows& rows) {
    compare(t, rows);
    rows.count = 0;
  }

  // Compares some queries with all rows in float.
  void scan(int64_t begin, int64_t end) {
    const int64_t total = *std::max_element(readable_ + begin, readable_ + end);
    Rows rows;
    for (int64_t first = 0; first < total; first += Rows::MOST) {
      for (int64_t i = first; i < std::min(first + Rows::MOST, total); ++i) rows.add(i, table_.row(i));
      for (int64_t t = begin; t < end; ++t) compare(t, rows);
      rows.count = 0;
    }
  }

  void scan_in_integers();
  void set_bars(const QuantizedQueries& queries, QuantizedRows& rows, const std::vector<double>& shift);

  const Instructions& with_;
  const float* floats_;
  const int64_t T_, d_, n_;
  const Table& table_;
  const int64_t* readable_;  // number of rows that each query can find: the first ones
  std::vector<Kept> kept_;
  const std::unique_ptr<Entry[]> entries_;  // not initialized: most is never used
  Lines lines_;
  std::vector<double> norm_;  // length of each query
  const QuantizedRows* const all_;
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
    rows.fill(0, held, [&](int64_t i) { return lines_.widened((begin + i) * step); });
    for (int64_t t = 0; t < T_; t += QUERIES) {
      for (int64_t i = 0; i < QUERIES; ++i) {
        integers[i] = queries.integers(std::min(t + i, T_));
        offsets[i] = queries.offset(std::min(t + i, T_));
      }
      for (int64_t row = 0; row < held; row += rows.together()) {
        rows.scores(row, integers, offsets, of_tiles.data());
        for (int64_t i = 0; i < std::min(QUERIES, T_ - t); ++i)
          std::copy_n(&of_tiles[i * rows.together()], std::min(rows.together(), held - row),
                      &scores[(t + i) * sampled + begin + row]);
      }
    }
  }
  std::vector<float> of_query;
  for (int64_t t = 0; t < T_; ++t) {
    of_query.assign(&scores[t * sampled], &scores[t * sampled] + sampled);
    const double bar = nth_largest(of_query, rank) / queries.inverse(t) + shift[t];
    if (std::fabs(bar) < INF) kept_[t].bar = static_cast<float>(bar);
  }
}

void TokenSearch::scan_in_integers() {
  const QuantizedQueries queries(with_, floats_, T_, d_);
  const int64_t together = with_.rows * with_.tiles;
  const int64_t block = rounded_up(std::max<int64_t>(together, BLOCK_BYTES / d_), together);
  const int64_t total = *std::max_element(readable_, readable_ + T_);
  QuantizedRows rows(with_, d_, block);
  rows.set_center(table_.size(), [&](int64_t i) { return lines_.widened(i); });
  std::vector<double> shift(T_);
  for (int64_t t = 0; t < T_; ++t) shift[t] = queries.shift(t, rows.center());
  set_bars(queries, rows, shift);

  const int8_t* integers[QUERIES];
  int32_t starts[QUERIES];
  float bars[QUERIES];
  uint64_t candidates[QUERIES];
  Rows near[QUERIES];
  for (int64_t begin = 0; begin < total; begin += block) {
    const int64_t held = std::min(block, total - begin);
    if (all_ == nullptr) rows.fill(0, held, [&](int64_t i) { return lines_.widened(begin + i); });
    for (int64_t t = 0; t < T_; t += QUERIES) {
      for (int64_t i = 0; i < QUERIES; ++i) {
        const int64_t at = std::min(t + i, T_);
        integers[i] = queries.integers(at);
        starts[i] = queries.start(at);
        // A sum of floats may be larger than the product by this, for rows of length 1.
        bars[i] = at < T_ ? queries.bar(at, kept_[at].bar - 1e-7 * d_ * norm_[at], shift[at]) : NAN;
      }
      for (int64_t row = 0; row < held; row += together) {
        if (all_ == nullptr) {
          rows.candidates(row, integers, starts, bars, candidates);
        } else {
          all_->candidates(begin + row, integers, starts, bars, candidates);
        }
        for (int64_t i = 0; i < QUERIES; ++i) {
          for (uint64_t left = candidates[i]; left; left &= left - 1) {
            const int64_t found = begin + row + __builtin_ctzll(left);
            near[i].add(found, table_.row(found));
          }
          if (near[i].count > Rows::MOST - together) compare_and_clear(t + i, near[i]);
        }
      }
      for (int64_t i = 0; i < std::min(QUERIES, T_ - t); ++i) compare_and_clear(t + i, near[i]);
    }
  }
}

}  // namespace

// Quantizes rows `begin` to `end` - 1 of a table whose rows of width d are in `pieces` one after the other, `sizes` rows
// each, for longmem_search_tokens. `begin` is a multiple of 64, and so is the number of rows in the arrays: `tiles`
// (rows, d rounded up to a multiple of 16), aligned to 64 bytes, and `numbers` (2, rows).
extern "C" void longmem_quantize_tokens(int64_t version, const uint16_t* const* pieces, const int64_t* sizes,
                                        int64_t n_pieces, int64_t d, int64_t begin, int64_t end, uint8_t* tiles,
                                        float* numbers, int64_t rows) {
  const DefaultRounding rounding;
  const Table table(pieces, sizes, n_pieces, d);
  Lines lines(*VERSIONS[version], table, d);
  QuantizedRows quantized(*VERSIONS[version], d, tiles, numbers, numbers + rows);
  const auto row = [&](int64_t i) { return lines.widened(i); };
  quantized.set_center(table.size(), row);
  quantized.fill(begin, end, row);
}

// Finds for each query (T, d) the n best of the first readable[t] rows of a table in half precision. Writes their products
// to `scores` (T, n) and their numbers to `best` (T, n), in the order of the table; of equal ones the first are found.
// Where there are fewer, the rest is -inf and -1. A query that is not finite finds nothing, and a row that is not finite
// is not found. Where `tiles` is not null, all rows were quantized; the arrays are those of longmem_quantize_tokens.
extern "C" void longmem_search_tokens(int64_t version, const float* queries, int64_t T, const uint16_t* const* pieces,
                                      const int64_t* sizes, int64_t n_pieces, int64_t d, const int64_t* readable,
                                      int64_t n, uint8_t* tiles, float* numbers, int64_t rows, float* scores,
                                      int64_t* best) {
  const DefaultRounding rounding;
  const Table table(pieces, sizes, n_pieces, d);
  const QuantizedRows all(*VERSIONS[version], d, tiles, numbers, numbers + rows);
  TokenSearch(*VERSIONS[version], queries, T, d, table, readable, n, tiles == nullptr ? nullptr : &all).run(scores, best);
}
