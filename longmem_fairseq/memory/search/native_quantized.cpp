// Queries and rows in 8-bit integers: see native_quantized.h.

#include "native_quantized.h"

namespace {

constexpr double ROUNDING = 1e-12;  // relative error of a sum of d products in double, at most

}  // namespace

QuantizedQueries::QuantizedQueries(const Instructions& with, const float* queries, int64_t T, int64_t d)
    : queries_(queries), d_(d), width_(rounded_up(d, MULTIPLE)), integers_((T + 1) * width_, 0), inverse_(T + 1, NAN),
      start_(T + 1, 0), offset_(T + 1, 0) {
  for (int64_t t = 0; t < T; ++t) quantize(t, with.most_query, with.offset);
}

void QuantizedQueries::quantize(int64_t t, int most, int offset) {
  const float* q = query(t);
  double largest = 0.0, sum = 0.0;
  for (int64_t i = 0; i < d_; ++i) {
    largest = std::max<double>(largest, std::fabs(q[i]));
    sum += std::fabs(q[i]);
  }
  if (!(sum < INF)) return;  // also where there is a NaN
  inverse_[t] = largest > 0.0 ? most / largest : INF;
  if (largest == 0.0) return;
  int32_t total = 0;
  for (int64_t i = 0; i < d_; ++i) {
    const double scaled = q[i] * inverse_[t];
    const int32_t whole = static_cast<int32_t>(scaled + (scaled < 0.0 ? -0.5 : 0.5));
    integers_[t * width_ + i] = static_cast<int8_t>(whole);
    total += whole;
  }
  offset_[t] = -offset * total;
  start_[t] = static_cast<int32_t>(std::ceil(SLACK * sum * inverse_[t] / 2.0)) + offset_[t];
}

float QuantizedQueries::bar(int64_t t, double least, double shift) const {
  constexpr double LARGEST = std::numeric_limits<float>::max();
  const double bar = (least - shift) * inverse_[t];
  // Rounded down, if by more than is needed: std::nextafter takes longer.
  return static_cast<float>(bar > LARGEST ? LARGEST : bar - (2e-7 * std::fabs(bar) + 2e-45));
}

double QuantizedQueries::shift(int64_t t, const std::vector<float>& center) const {
  const float* q = query(t);
  double shift = 0.0, magnitudes = 0.0;
  for (int64_t i = 0; i < d_; ++i) {
    const double product = static_cast<double>(q[i]) * center[i];
    shift += product;
    magnitudes += std::fabs(product);
  }
  return shift + ROUNDING * magnitudes;
}

QuantizedRows::QuantizedRows(const Instructions& with, int64_t d, int64_t most_rows)
    : with_(with), width_(rounded_up(d, MULTIPLE)), center_(d), line_(width_), storage_(most_rows * width_ + 64),
      numbers_(2 * most_rows), scales_(&numbers_[0]), halves_(&numbers_[most_rows]) {
  tiles_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(storage_.data()) + 63) / 64 * 64);
}

void QuantizedRows::put(int64_t i, const float* row) {
  with_.quantize(row, center_.data(), center_.size(), width_, line_.data(), &scales_[i], &halves_[i]);
  uint8_t* to = tiles_ + i / with_.rows * width_ * with_.rows + i % with_.rows * 4;
  for (int64_t g = 0; g < width_ / 4; ++g) std::memcpy(to + g * with_.rows * 4, &line_[g * 4], 4);
}
