// Sums and updates along vectors, vectorised.
#pragma once

#include <cstdint>

namespace otloss::cpu {

// Sums over vectors, in double: sum x y, sum w x y, and sum w |q - 1|, the L1 marginal error of a
// marginal given as a ratio q to what it should be.
template <typename T>
double dot(int64_t count, const T* x, const T* y);
template <typename T>
double dot(int64_t count, const T* w, const T* x, const T* y);
template <typename T>
double marginal_error(int64_t count, const T* w, const T* q);

// sum w v and sum w |v|.
struct SumAndSize {
  double sum, size;
};
template <typename T>
SumAndSize sum_and_size(int64_t count, const T* w, const T* v);

// total += c, in double.
template <typename T>
void add_sums(int64_t count, const T* c, double* total);

// q_j = c_j / b_j, 1 where b_j is 0; whether all of them are trusted and above least / b_j.
template <typename T>
bool column_ratios(int64_t count, const double* c, const T* b, double least, T* q);

// y_j -= log2 x_j, elementwise: the update of a potential from its sums.
template <typename T>
void subtract_log2(int64_t count, const T* x, T* y);

// G = k g + log2 b.
template <typename T>
void absorb_weights(int64_t count, T k, const T* g, const T* b, T* G);

}  // namespace otloss::cpu
