// The large entries of a plan, for Newton's step (sparse_newton.h), vectorised. Units as in
// sweep.h.
#pragma once

#include <cstdint>

namespace otloss::cpu {

// Those of one row that are more than 2^least of their row's or of their column's sum.
template <typename T>
struct LargeEntries {
  int64_t m;  // columns
  T k;
  T least;
  T F;         // exact row update
  T R;         // log2 of the row sum, kLog2Zero where the weight is 0
  const T* C;  // (m,)
  const T* G;  // (m,)
  const T* S;  // (m,) log2 of the column sums, -kLog2Zero where the weight is 0
};

// How many there are, and the part of their rows that they hold, by limits that are each `step`
// above the one before.
constexpr int kLimits = 4;
struct LargeCounts {
  int64_t entries[kLimits];
  double held[kLimits];
};

// Adds those of a row.
template <typename T>
void count_large(const LargeEntries<T>& row, double step, LargeCounts& counts);

// Lists them in order; returns how many. `column` and `cost` have room for all columns and
// kEntriesAtOnce more, `marks` (m + kEntriesAtOnce,) is 0 from m on.
constexpr int64_t kEntriesAtOnce = 8;

template <typename T>
int64_t list_large(const LargeEntries<T>& row, uint8_t* marks, int32_t* column, T* cost);

// The values of entries of the plan over their row's sum, on exact row updates F.
template <typename T>
struct EntryValues {
  int64_t rows;  // n
  T k;
  const T* F;             // (n,)
  const T* G;             // (m,)
  const int64_t* end;     // (n,)
  const int32_t* column;  // (entries,)
  const T* cost;          // (entries,)
  T* value;               // (entries,) out
};

template <typename T>
void entry_values(const EntryValues<T>& entries);

}  // namespace otloss::cpu
