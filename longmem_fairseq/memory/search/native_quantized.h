// Queries and rows in 8-bit integers, as all searches use them, and the bound of a product; see native_search.cpp.
//
// Legend: T queries, d width of a query and of a row.

#pragma once

#include <xmmintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "native_search.h"

constexpr double INF = std::numeric_limits<double>::infinity();

inline int64_t rounded_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// While it exists, floats are rounded to the nearest and not flushed to zero, whatever the caller has set.
class DefaultRounding {
 public:
  DefaultRounding() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultRounding() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
};

// Queries (T, d) as integers, and one more, query T, that finds nothing.
class QuantizedQueries {
 public:
  QuantizedQueries(const Instructions& with, const float* queries, int64_t T, int64_t d);

  const float* query(int64_t t) const { return queries_ + t * d_; }
  const int8_t* integers(int64_t t) const { return &integers_[t * width_]; }
  int32_t start(int64_t t) const { return start_[t]; }    // |q|_1 / (2 sq), minus what the rows' offset adds
  int32_t offset(int64_t t) const { return offset_[t]; }  // the latter alone
  double inverse(int64_t t) const { return inverse_[t]; }

  // Returns what the bounds of a query's products are compared with: a row whose product with the query may be `least`
  // or more reaches it. It is not a number, so that no row reaches it, for a query that finds nothing (more): one that
  // is not finite, or one of zeros that has found as many rows as it may.
  float bar(int64_t t, double least, double shift) const;

  // Returns q . center, rounded up.
  double shift(int64_t t, const std::vector<float>& center) const;

 private:
  void quantize(int64_t t, int most, int offset);

  const float* queries_;
  const int64_t d_, width_;
  std::vector<int8_t> integers_;  // a
  std::vector<double> inverse_;   // 1 / sq; infinite for a query of zeros, NaN for one that is not finite
  std::vector<int32_t> start_, offset_;
};

// Rows minus a center, as integers.
class QuantizedRows {
 public:
  // Has room for `most_rows` rows, a multiple of together().
  QuantizedRows(const Instructions& with, int64_t d, int64_t most_rows);

  // Has room in arrays of others: `tiles` (most_rows, d rounded up to MULTIPLE), aligned to 64 bytes, and one scale and
  // one half for each row.
  QuantizedRows(const Instructions& with, int64_t d, uint8_t* tiles, float* scales, float* halves)
      : with_(with), width_(rounded_up(d, MULTIPLE)), center_(d), line_(width_), tiles_(tiles), scales_(scales),
        halves_(halves) {}

  // Sets the center to the mean of about SAMPLE of `rows` rows; row(i) returns row i, shape (d,).
  template <class Row>
  void set_center(int64_t rows, Row row) {
    constexpr int64_t SAMPLE = 256;
    const int64_t step = std::max<int64_t>(1, rows / SAMPLE);
    std::fill(center_.begin(), center_.end(), 0.0f);
    for (int64_t i = 0; i < rows; i += step) {
      const float* x = row(i);
      for (size_t j = 0; j < center_.size(); ++j) center_[j] += x[j];
    }
    for (float& x : center_) {
      x /= (rows + step - 1) / step;
      if (!(std::fabs(x) < INF)) x = 0.0f;
    }
  }

  // Quantizes rows `begin` (a multiple of together()) to `end` - 1, and fills the last tiles with rows that are never
  // candidates; row(i) returns row i.
  template <class Row>
  void fill(int64_t begin, int64_t end, Row row) {
    for (int64_t i = begin; i < rounded_up(end, together()); ++i) {
      scales_[i] = 0.0f;
      halves_[i] = NAN;  // compares false
      if (i < end) put(i, row(i));
    }
  }

  int64_t together() const { return with_.rows * with_.tiles; }  // rows that are compared together
  const std::vector<float>& center() const { return center_; }

  // Finds the candidates among rows `row` to `row` + together() - 1; see Instructions.
  void candidates(int64_t row, const int8_t* const* integers, const int32_t* starts, const float* bars,
                  uint64_t* candidates) const {
    with_.candidates(tiles_ + row * width_, width_ / 4, integers, starts, bars, &scales_[row], &halves_[row], candidates);
  }

  // Writes their scores; see Instructions.
  void scores(int64_t row, const int8_t* const* integers, const int32_t* offsets, float* scores) const {
    with_.scores(tiles_ + row * width_, width_ / 4, integers, offsets, &scales_[row], scores);
  }

 private:
  void put(int64_t i, const float* row);

  const Instructions& with_;
  const int64_t width_;  // d, rounded up
  std::vector<float> center_;
  std::vector<uint8_t> line_, storage_;
  std::vector<float> numbers_;
  uint8_t* tiles_;
  float* scales_;
  float* halves_;
};
