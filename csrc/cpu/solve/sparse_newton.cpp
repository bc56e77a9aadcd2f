#include "cpu/solve/sparse_newton.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "core/math.h"
#include "cpu/simd/sweep.h"

namespace otloss::cpu {
namespace {

// Steps begin at an error of at most kNear after a sweep that left over kSlow of the error.
constexpr double kNear = 0.3, kSlow = 0.5;
constexpr double kDamping = 0.3;    // over the error
constexpr double kTolerance = 0.2;  // of a step: more exact ones save no sweeps
constexpr int64_t kMaxIterations = 50;
// Entries are looked for again when what they miss has grown to more than this.
constexpr double kMissingGrowth = 2, kMissingSlack = 2e-3;

// A test compares the steps of L-BFGS alone with those of a GPU.
bool is_off(const char* setting) { return setting && std::string_view(setting) == "0"; }

// sum_e value_e v[column_e] in four sums, which need not wait for each other.
template <typename T>
double gather(const T* value, const int32_t* column, const double* v, int64_t begin, int64_t end) {
  double sum[4] = {};
  int64_t e = begin;
  for (; e + 4 <= end; e += 4)
    for (int64_t k = 0; k < 4; ++k) sum[k] += static_cast<double>(value[e + k]) * v[column[e + k]];
  for (; e < end; ++e) sum[0] += static_cast<double>(value[e]) * v[column[e]];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace

template <typename T>
SparseNewton<T>::SparseNewton(Engine<T>& engine)
    : x_(engine.x),
      y_(engine.y),
      costs_(engine.costs()),
      wanted_(!is_off(std::getenv("OTLOSS_NEWTON"))) {}

template <typename T>
bool SparseNewton<T>::prepare(double eps, const T* F, const SemidualPoint<T>& point, int64_t sweeps,
                              int64_t& readings) {
  slow_ = slow_ || point.error > kSlow * last_error_;
  last_error_ = point.error;
  if (!wanted_ || !slow_ || point.error > kNear) return false;
  if (!found_ && sweeps < next_search_) return false;
  plan_.set(eps, x_, y_, F, point);
  coupling_ = x_.damping(eps) * y_.damping(eps);
  if (found_) {
    take_values(eps, F);
    if (missing_ <= kMissingGrowth * missing_at_first_ + kMissingSlack) return true;
  }
  found_ = find(eps, F, sweeps);
  next_search_ = 2 * sweeps;
  if (!found_) return false;
  ++readings;
  take_values(eps, F);
  missing_at_first_ = missing_;
  return true;
}

template <typename T>
void SparseNewton<T>::step(double error, std::vector<T>& p) {
  const double damping = kDamping * error, before = mean(p);
  const Vector& c = plan_.column;
  for (size_t j = 0; j < c.size(); ++j) {
    right_[j] = c[j] * (static_cast<double>(p[j]) - before);
    inverse_[j] = c[j] > 0 ? 1 / (diagonal_[j] + damping * c[j]) : 0.0;
  }
  const auto apply = [&](const Vector& v, Vector& out) {
    product(v, out);
    for (size_t j = 0; j < c.size(); ++j) out[j] = (1 + damping) * c[j] * v[j] - coupling_ * out[j];
  };
  conjugate_gradients(
      {kTolerance, 0, kMaxIterations}, inverse_, apply, [](Vector&) {}, right_, solution_);
  const double after = mean(solution_);
  for (size_t j = 0; j < c.size(); ++j)
    if (c[j] > 0) p[j] = static_cast<T>(solution_[j] - after);
}

// Looks for the entries of the plan that hold most of it: those of more than 2^-10 of their row's
// or column's sum, or, where they are too many, 2^-8 to 2^-4. A sample of rows tells beforehand:
// false without a reading of all pairs where they are too many for the sweeps made so far, or hold
// too little.
template <typename T>
bool SparseNewton<T>::find(double eps, const T* F, int64_t sweeps) {
  constexpr double kLeast = -10, kStep = 2, kLeastHeld = 0.9;
  constexpr int64_t kCountedRows = 64;
  const std::vector<int64_t> rows = x_.sample(kCountedRows);
  const double most = most_large(sweeps), sampled = static_cast<double>(rows.size());
  if (rows.empty()) return false;
  LargeCounts all{};
  for (const int64_t i : rows)
    count_large(plan_.large(eps, F, kLeast, costs_.row(i), i), kStep, all);
  for (int k = 0; k < kLimits; ++k) {
    if (all.held[k] < kLeastHeld * sampled) return false;
    const double share = static_cast<double>(all.entries[k]) / (sampled * y_.count);
    if (share > most) continue;
    list(eps, F, kLeast + kStep * k, share);
    return true;
  }
  return false;
}

// The part of all entries that may be listed after this number of sweeps: Newton's steps then take
// about as long as was spent without them. A listed entry costs as much as some twenty float32
// entries of a sweep over costs in the cache (kCheap is for each byte of an entry), and as a few
// where costs come from memory or are made.
template <typename T>
double SparseNewton<T>::most_large(int64_t sweeps) const {
  constexpr double kCheap = 0.0025, kDear = 0.05, kMost = 0.25, kEntries = 1 << 22,
                   kCache = 4 << 20;
  const double entries = static_cast<double>(x_.count) * static_cast<double>(y_.count);
  const bool cheap = costs_.source().stored() && entries * sizeof(T) <= kCache;
  return std::min({static_cast<double>(sweeps) * (cheap ? kCheap * sizeof(T) : kDear), kMost,
                   kEntries / entries});
}

template <typename T>
void SparseNewton<T>::SparseRows::reserve(int64_t entries) {
  if (entries <= static_cast<int64_t>(column.size())) return;
  const auto size = std::max<size_t>(entries, column.size() + column.size() / 2);
  column.resize(size), cost.resize(size);
}

// Lists all that are large, about `share` of all entries.
template <typename T>
void SparseNewton<T>::list(double eps, const T* F, double least, double share) {
  constexpr double kRoom = 1.2;
  const int64_t m = y_.count;
  parts_.resize(costs_.parts().count());
  costs_.parts().for_each([&](int64_t index, int64_t begin, int64_t end) {
    SparseRows& part = parts_[index];
    part.begin = begin;
    part.end.resize(end - begin);
    part.reserve(static_cast<int64_t>(kRoom * share * static_cast<double>((end - begin) * m)));
    std::vector<uint8_t> marks(m + kEntriesAtOnce);
    int64_t listed = 0;
    costs_.for_each_block(index, begin, end, [&](const T* C, int64_t first, int64_t rows) {
      for (int64_t i = first; i < first + rows; ++i) {
        part.reserve(listed + m + kEntriesAtOnce);
        listed +=
            list_large(plan_.large(eps, F, least, C + (i - first) * costs_.source().stride(), i),
                       marks.data(), part.column.data() + listed, part.cost.data() + listed);
        part.end[i - begin] = listed;
      }
    });
    part.value.resize(listed);
  });
}

// Values of the entries, the matrix's diagonal, and what part of the plan they miss.
template <typename T>
void SparseNewton<T>::take_values(double eps, const T* F) {
  constexpr double kLeastDiagonal = 1e-3;
  sums_.clear();
  costs_.parts().for_each([&](int64_t index, int64_t begin, int64_t end) {
    SparseRows& part = parts_[index];
    entry_values(EntryValues<T>{end - begin, factor<T>(eps), F + begin, plan_.G.data(),
                                part.end.data(), part.column.data(), part.cost.data(),
                                part.value.data()});
    double* squares = sums_.part(index);
    int64_t e = 0;
    part.kept = 0;
    for (size_t i = 0; i < part.end.size(); ++i) {
      const double r = plan_.row[begin + i];
      double sum = 0;
      for (; e < part.end[i]; ++e) {
        const double value = static_cast<double>(part.value[e]);
        squares[part.column[e]] += r * value * value;
        sum += value;
      }
      part.kept += r * sum;
    }
  });
  double kept = 0, all = 0;
  for (const SparseRows& part : parts_) kept += part.kept;
  for (const double r : plan_.row) all += r;
  missing_ = 1 - kept / all;
  const Vector& c = plan_.column;
  const double* squares = sums_.total();
  for (size_t j = 0; j < c.size(); ++j)
    diagonal_[j] = std::max(c[j] - coupling_ * squares[j], kLeastDiagonal * c[j]);
}

// In the weights of the columns.
template <typename T>
template <typename Value>
double SparseNewton<T>::mean(const std::vector<Value>& v) const {
  double sum = 0, total = 0;
  for (size_t j = 0; j < v.size(); ++j) {
    sum += plan_.column[j] * static_cast<double>(v[j]);
    total += plan_.column[j];
  }
  return sum / total;
}

// out = P^T diag(1/r) P v.
template <typename T>
void SparseNewton<T>::product(const Vector& v, Vector& out) {
  sums_.clear();
  const auto of_part = [&](int64_t index) {
    const SparseRows& part = parts_[index];
    double* sum = sums_.part(index);
    int64_t begin = 0;
    for (size_t i = 0; i < part.end.size(); ++i) {
      const int64_t end = part.end[i];
      const double along = plan_.row[part.begin + i] *
                           gather(part.value.data(), part.column.data(), v.data(), begin, end);
      for (int64_t e = begin; e < end; ++e)
        sum[part.column[e]] += static_cast<double>(part.value[e]) * along;
      begin = end;
    }
  };
  const int64_t parts = static_cast<int64_t>(parts_.size());
  const size_t worth = may_be_helped() ? 1 << 11 : 1 << 16;  // entries
  if (parts_[0].value.size() * parts_.size() < worth)
    for (int64_t part = 0; part < parts; ++part) of_part(part);
  else
    parallel_tasks(parts, of_part);
  std::copy_n(sums_.total(), out.size(), out.begin());
}

template class SparseNewton<float>;
template class SparseNewton<double>;

}  // namespace otloss::cpu
