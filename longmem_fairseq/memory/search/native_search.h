// The parts of the search that are written once for each set of processor instructions, and what each needs to know.

#pragma once

#include <cstdint>

constexpr int64_t WIDEST = 8192;   // largest width: sums of integers fit into 32 bits, and what a float loses into SLACK
constexpr int64_t QUERIES = 4;     // queries that are compared together
constexpr int64_t MULTIPLE = 16;   // widths and rooms for results are rounded up to a multiple of this
constexpr float SLACK = 1.01f;     // factor on bounds, for rounding
constexpr float TINIEST = 1e-30f;  // rows without a larger magnitude have no integers, which would need larger factors

struct Instructions {
  int64_t rows;     // rows of a tile: a register holds one 32-bit sum of each
  int64_t tiles;    // tiles that are compared together
  int most_row;     // largest integer of a row; it is stored plus an offset,
  int offset;       // which makes it positive
  int most_query;   // largest integer of a query
  bool (*supported)();

  // Returns the inner product of x and y, shape (d,). Products of floats are exact in a double.
  double (*dot)(const float* x, const float* y, int64_t d);

  // Quantizes a row minus the center, shape (d,), into `width` integers, each plus the offset; those from d on are the
  // offset. No inner product of the row minus the center and a query is above
  //     scale * (integers . the query's + its start) + half, times the query's scale.
  // half is NaN for a row that is not finite, and infinite for one that has no integers as it is too large.
  void (*quantize)(const float* row, const float* center, int64_t d, int64_t width, uint8_t* integers, float* scale,
                   float* half);

  // Finds the rows of `tiles` tiles whose bound is not below the query's bar, as bits, for each of QUERIES queries.
  // Four integers of each row of a tile are stored together, and `groups` of these one after the other.
  void (*candidates)(const uint8_t* tiles, int64_t groups, const int8_t* const* queries, const int32_t* starts,
                     const float* bars, const float* scales, const float* halves, uint64_t* candidates);

  // Writes the products of the same rows and queries, without their bound, but times the rows' scales: (QUERIES, rows of
  // the tiles).
  void (*scores)(const uint8_t* tiles, int64_t groups, const int8_t* const* queries, const int32_t* starts,
                 const float* scales, float* scores);

  // Replaces the lowest of `room` scores (a multiple of MULTIPLE) and its row, and returns the new lowest score.
  double (*replace_lowest)(double score, int64_t row, int64_t room, double lowest, double* scores, int64_t* rows);

  // Writes numbers of half precision, shape (d,), as floats.
  void (*widen)(const uint16_t* halves, int64_t d, float* floats);

  // Writes the inner products, in float, of x and each of some rows, shape (d,). A product depends on its row alone.
  void (*dot_halves)(const float* x, const uint16_t* const* rows, int64_t count, int64_t d, float* products);
};

extern const Instructions AVX512;
extern const Instructions AVX2;
extern const Instructions* const VERSIONS[];  // numbered from 0, the fastest first
