// The inner loops over a stored cost matrix, vectorised. See sweep.cpp.
//
// Everything is in base-2 units: F = k f, G = k g + log2 b, k = log2(e) / eps, so that an entry of
// the plan divided by its row weight is P_ij / a_i = exp2(F_i + G_j - k C_ij).
#pragma once

#include <cstdint>

namespace otloss::cpu {

template <typename T>
struct RowSweep {
  int64_t rows;  // n
  int64_t m;     // columns
  T k;
  const T* C;        // (n, m)
  const T* a;        // (n,)
  const T* G;        // (padded m,) kLog2Zero from m on: rows are read to that width, and what
                     // lies there, the next row, does not count
  T* F;              // (n,) in: any guess, out: the exact update -log2 sum_j exp2(G_j - k C_ij)
  T* s;              // (n,) out: row sums of the plan before the update, over a
  T* c;              // (m,) accumulated: column sums of the plan after the update, with
                     // room for padded m; null: not wanted
  T* e;              // (kSweepScratchRows, padded m) scratch, finite on entry
  int64_t readable;  // rows [0, readable) of C may be read up to the padded width
  T tilt;            // c is of the plan of (1 + tilt) F: 0, or less where rows are damped
};

constexpr int64_t kSweepScratchRows = 4;

// One full iteration's reading of C: rows are made exact and their column sums accumulated, with
// one exp2 per entry. A factor for each row is all that damping takes.
void sweep_rows(const RowSweep<float>& sweep);
void sweep_rows(const RowSweep<double>& sweep);

template <typename T>
struct ColumnLse {
  int64_t n;       // rows
  int64_t width;   // columns, at most kColumnBlock
  int64_t stride;  // distance of rows of C
  T k;
  const T* C;  // (n, width)
  const T* A;  // (n,) F + log2 a
  T* out;      // (width,) log2 sum_i exp2(A_i - k C_ij)
};

constexpr int64_t kColumnBlock = 64;

// The max-shifted log-sum-exp of a block of columns, for those whose sums cannot be trusted.
void column_lse(const ColumnLse<float>& block);
void column_lse(const ColumnLse<double>& block);

template <typename T>
struct PlanRows {
  int64_t rows;  // n
  int64_t m;     // columns
  T k;
  T scale;
  const T* C;  // (n, m)
  const T* a;  // (n,)
  const T* F;  // (n,)
  const T* G;  // (m,)
  T* P;        // (n, m) out: scale * plan
};

void plan_rows(const PlanRows<float>& plan);
void plan_rows(const PlanRows<double>& plan);

// <P, C> over the rows; `P` and `scale` are not used.
double transport_rows(const PlanRows<float>& plan);
double transport_rows(const PlanRows<double>& plan);

template <typename T>
struct MaxAbs {
  int64_t rows;  // n
  int64_t m;     // columns
  const T* C;    // (n, m)
  const T* a;    // (n,)
  const T* b;    // (m,)
};

// Entries of the plan that are more than 2^least of their row's or of their column's sum.
template <typename T>
struct LargeEntries {
  int64_t rows;  // n
  int64_t m;     // columns
  T k;
  T least;
  const T* C;  // (n, m)
  const T* F;  // (n,) exact row updates
  const T* G;  // (m,)
  const T* R;  // (n,) log2 of the row sums, kLog2Zero where the weight is 0
  const T* S;  // (m,) log2 of the column sums, -kLog2Zero where the weight is 0
};

// How many there are, and the part of their rows that they hold, over all rows.
struct LargeCount {
  int64_t entries;
  double held;
};

LargeCount count_large(const LargeEntries<float>& entries);
LargeCount count_large(const LargeEntries<double>& entries);

// Lists those of the first row, in order; returns how many. `column` and `cost` have room for all
// columns and kEntriesAtOnce more, `marks` (m + kEntriesAtOnce,) is 0 from m on.
constexpr int64_t kEntriesAtOnce = 8;

int64_t list_large(const LargeEntries<float>& entries, uint8_t* marks, int32_t* column,
                   float* cost);
int64_t list_large(const LargeEntries<double>& entries, uint8_t* marks, int32_t* column,
                   double* cost);

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

void entry_values(const EntryValues<float>& entries);
void entry_values(const EntryValues<double>& entries);

// max |C_ij| where a_i b_j > 0; NaN if any of those is not finite.
double max_abs(const MaxAbs<float>& args);
double max_abs(const MaxAbs<double>& args);

// Sums over vectors, in double: sum x y, sum w x y, and sum w |q - 1|, the L1 marginal error of a
// marginal given as a ratio q to what it should be.
double dot(int64_t count, const float* x, const float* y);
double dot(int64_t count, const double* x, const double* y);
double dot(int64_t count, const float* w, const float* x, const float* y);
double dot(int64_t count, const double* w, const double* x, const double* y);
double marginal_error(int64_t count, const float* w, const float* q);
double marginal_error(int64_t count, const double* w, const double* q);

// sum w v and sum w |v|.
struct SumAndSize {
  double sum, size;
};
SumAndSize sum_and_size(int64_t count, const float* w, const float* v);
SumAndSize sum_and_size(int64_t count, const double* w, const double* v);

// total += c, in double.
void add_sums(int64_t count, const float* c, double* total);
void add_sums(int64_t count, const double* c, double* total);

// q_j = c_j / b_j, 1 where b_j is 0; whether all of them are trusted and above least / b_j.
bool column_ratios(int64_t count, const double* c, const float* b, double least, float* q);
bool column_ratios(int64_t count, const double* c, const double* b, double least, double* q);

// y_j -= log2 x_j, elementwise: the update of a potential from its sums.
void subtract_log2(int64_t count, const float* x, float* y);
void subtract_log2(int64_t count, const double* x, double* y);

// G = k g + log2 b.
void absorb_weights(int64_t count, float k, const float* g, const float* b, float* G);
void absorb_weights(int64_t count, double k, const double* g, const double* b, double* G);

}  // namespace otloss::cpu
