// Passes over the cost of one problem, for the solver: sums of rows and columns of the plan, in
// blocks of rows that a source hands out (rows.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/math.h"
#include "cpu/engines/rows.h"
#include "cpu/parallel.h"
#include "cpu/problems.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/marginal.h"
#include "cpu/solve/sparse_newton.h"
#include "kernels.h"

namespace otloss::cpu {

template <typename T, typename Source>
class Engine {
 public:
  const int64_t n, m;
  const T* const a;
  const T* const b;
  const Side<T> x, y;

  Engine(int64_t n, int64_t m, const T* a, const T* b, const Source& source, bool split,
         const Strength& strength = {})
      : n(n),
        m(m),
        a(a),
        b(b),
        x(n, a, strength.rho_x),
        y(m, b, strength.rho_y),
        source_(source),
        parts_(1),
        G_(padded<T>(m), T(kLog2Zero)),
        s_(n) {
    if (split) parts_ = std::clamp<int64_t>(n * m / kSplitGrain, 1, std::min(thread_count(), n));
    workspaces_.resize(parts_);
    for (Workspace& w : workspaces_) {
      w.c.resize(padded<T>(m));
      w.total.resize(m);
      w.e.resize(kSweepScratchRows * padded<T>(m));
      w.C.resize(source.scratch());
    }
  }

  // F = exact row update of g (and the guess on entry), s = row sums before it over a.
  void update_rows(double eps, const T* g, T* F, T* s) {
    absorb(eps, g);
    for_each_part([&](Workspace& w, int64_t begin, int64_t end) {
      sweep(eps, w, begin, end, F, s, nullptr);
    });
  }

  // The same, then gt = column update of F and q = column sums of the plan (F, g) over b; F damped
  // in both, where rows are.
  void iterate(double eps, const T* g, T* F, T* gt, T* q) {
    absorb(eps, g);
    for_each_part([&](Workspace& w, int64_t begin, int64_t end) {
      std::fill(w.total.begin(), w.total.end(), 0.0);
      for (int64_t i = begin; i < end; i += kFlushRows) {
        std::fill(w.c.begin(), w.c.end(), T(0));
        sweep(eps, w, i, std::min(end, i + kFlushRows), F, s_.data(), w.c.data());
        add_sums(m, w.c.data(), w.total.data());
      }
    });
    double* c = workspaces_[0].total.data();
    for (int64_t part = 1; part < parts_; ++part)
      for (int64_t j = 0; j < m; ++j) c[j] += workspaces_[part].total[j];
    update_columns(eps, g, F, c, gt, q);
  }

  // Looks for the entries of the plan (F, g), F the exact row update of g, that hold most of it:
  // those of more than 2^-10 of their row's or column's sum, or, where they are too many, 2^-8 to
  // 2^-4. A sample of rows tells beforehand; false without a reading of all pairs where they are
  // too many for so many sweeps, or hold too little.
  bool find_large(double eps, const T* F, const T* g, const PlanMarginals<T>& marginals,
                  int64_t sweeps, std::vector<SparseRows<T>>& parts) {
    constexpr double kLeast = -10, kMost = -4, kStep = 2, kLeastHeld = 0.9;
    const std::vector<int64_t> rows = sample(n, a, kCountedRows);
    const double most = most_large(sweeps), sampled = static_cast<double>(rows.size());
    if (rows.empty()) return false;
    absorb(eps, g);
    for (double least = kLeast; least <= kMost; least += kStep) {
      const auto large = [&](const T* C, int64_t i, int64_t count) {
        return LargeEntries<T>{count,
                               m,
                               factor(eps),
                               static_cast<T>(least),
                               C,
                               F + i,
                               G_.data(),
                               marginals.R.data() + i,
                               marginals.S.data()};
      };
      const LargeCount counted = count_sample(rows, large);
      if (counted.held < kLeastHeld * sampled) return false;
      const double share = static_cast<double>(counted.entries) / (sampled * m);
      if (share > most) continue;
      list_all(large, share, parts);
      return true;
    }
    return false;
  }

  // Their values over the row's sum.
  void entry_values(double eps, const T* F, const T* g, std::vector<SparseRows<T>>& parts) {
    absorb(eps, g);
    for_each_part([&](Workspace& w, int64_t begin, int64_t end) {
      SparseRows<T>& part = parts[index_of(w)];
      cpu::entry_values(EntryValues<T>{end - begin, factor(eps), F + begin, G_.data(),
                                       part.end.data(), part.column.data(), part.cost.data(),
                                       part.value.data()});
    });
  }

  // <P, C>.
  double transport(double eps, const T* F, const T* g) {
    absorb(eps, g);
    for_each_part([&](Workspace& w, int64_t begin, int64_t end) {
      w.sum = 0;
      for_each_block(source_, begin, end, w.C.data(), [&](const T* C, int64_t i, int64_t count) {
        w.sum += transport_rows(
            PlanRows<T>{count, m, factor(eps), T(1), C, a + i, F + i, G_.data(), nullptr});
      });
    });
    double sum = 0;
    for (const Workspace& w : workspaces_) sum += w.sum;
    return sum;
  }

  // A start that may be better than 0, if it takes less time than so many sweeps.
  bool propose(double sweeps, double eps, T* g) const {
    return source_.propose(sweeps, eps, a, b, g);
  }

  // max |C_ij| over points of positive weight or a bound of it, NaN if one is not finite.
  double max_cost() const { return source_.max_cost(a, b); }

  // Standard deviation of C_ij - mean_i - mean_j + mean on at most 256 x 256 points: against eps,
  // how hard the problem is.
  double sigma() const {
    constexpr int64_t kSample = 256;
    const std::vector<int64_t> rows = sample(n, a, kSample), columns = sample(m, b, kSample);
    if (rows.size() < 2 || columns.size() < 2) return 0;
    const size_t r = rows.size(), c = columns.size();
    std::vector<double> C(r * c), row(r), column(c);
    std::vector<T> scratch(source_.scratch());
    double mean = 0, sum = 0;
    for (size_t i = 0; i < r; ++i) {
      const T* costs = source_.rows(rows[i], 1, scratch.data());
      for (size_t j = 0; j < c; ++j) {
        const double value = C[i * c + j] = static_cast<double>(costs[columns[j]]);
        row[i] += value / c, column[j] += value / r, mean += value / (r * c);
      }
    }
    for (size_t i = 0; i < r; ++i)
      for (size_t j = 0; j < c; ++j) {
        const double value = C[i * c + j] - row[i] - column[j] + mean;
        sum += value * value;
      }
    return std::sqrt(sum / (r * c));
  }

 private:
  static constexpr int64_t kCountedRows = 64;

  // Column sums in the kernels' precision are added up in double after so many rows.
  static constexpr int64_t kFlushRows = 4096;

  struct Workspace {            // of one thread
    BlockVector<T> c;           // (padded m,) column sums of some rows
    std::vector<double> total;  // (m,) of all its rows
    BlockVector<T> e;           // (kSweepScratchRows, padded m)
    BlockVector<T> C;           // rows that were made
    double sum = 0;
  };

  int64_t index_of(const Workspace& w) const { return &w - workspaces_.data(); }

  // The part of all entries that may be listed after so many sweeps: what Newton's steps take is
  // then about what was spent without them. A listed entry costs as much as some twenty float32
  // entries of a sweep over costs in the cache (kCheap is for each byte of an entry), and as a few
  // where costs come from memory or are made.
  double most_large(int64_t sweeps) const {
    constexpr double kCheap = 0.0025, kDear = 0.05, kMost = 0.25, kEntries = 1 << 22,
                     kCache = 4 << 20;
    const double entries = static_cast<double>(n) * static_cast<double>(m);
    const bool cheap = source_.scratch() == 0 && entries * sizeof(T) <= kCache;
    return std::min({static_cast<double>(sweeps) * (cheap ? kCheap * sizeof(T) : kDear), kMost,
                     kEntries / entries});
  }

  template <typename Large>
  LargeCount count_sample(const std::vector<int64_t>& rows, Large&& large) {
    LargeCount all{0, 0};
    for (const int64_t i : rows) {
      const LargeCount row = count_large(large(source_.rows(i, 1, workspaces_[0].C.data()), i, 1));
      all.entries += row.entries, all.held += row.held;
    }
    return all;
  }

  // Lists all that are large, about `share` of all entries.
  template <typename Large>
  void list_all(Large&& large, double share, std::vector<SparseRows<T>>& parts) {
    constexpr double kRoom = 1.2;
    parts.resize(parts_);
    for_each_part([&](Workspace& w, int64_t begin, int64_t end) {
      SparseRows<T>& part = parts[index_of(w)];
      part.begin = begin;
      part.end.resize(end - begin);
      part.reserve(static_cast<int64_t>(kRoom * share * static_cast<double>((end - begin) * m)));
      std::vector<uint8_t> marks(m + kEntriesAtOnce);
      int64_t listed = 0;
      for_each_block(source_, begin, end, w.C.data(), [&](const T* C, int64_t i, int64_t count) {
        for (int64_t row = 0; row < count; ++row) {
          part.reserve(listed + m + kEntriesAtOnce);
          listed += list_large(large(C + row * m, i + row, 1), marks.data(),
                               part.column.data() + listed, part.cost.data() + listed);
          part.end[i + row - begin] = listed;
        }
      });
      part.value.resize(listed);
    });
  }

  static T factor(double eps) { return static_cast<T>(kLog2E / eps); }
  T tilt(double eps) const { return static_cast<T>(-eps * x.rate * x.damping(eps)); }

  void absorb(double eps, const T* g) { absorb_weights(m, factor(eps), g, b, G_.data()); }

  template <typename Function>
  void for_each_part(Function&& function) {
    if (parts_ == 1) return function(workspaces_[0], int64_t{0}, n);
    const int64_t rows = (n + parts_ - 1) / parts_;
    parallel_tasks(parts_, [&](int64_t part) {
      const int64_t begin = std::min(n, part * rows);
      function(workspaces_[part], begin, std::min(n, begin + rows));
    });
  }

  void sweep(double eps, Workspace& w, int64_t begin, int64_t end, T* F, T* s, T* c) {
    for_each_block(source_, begin, end, w.C.data(), [&](const T* C, int64_t i, int64_t count) {
      // The last row that may be read to its padded width ends within the memory.
      const int64_t beyond = source_.available(i) - padded<T>(m);
      const int64_t readable = beyond < 0 ? 0 : std::min(count, beyond / m + 1);
      sweep_rows(RowSweep<T>{count, m, factor(eps), C, a + i, G_.data(), F + i, s + i, c,
                             w.e.data(), readable, tilt(eps)});
    });
  }

  // gt_j = g_j - eps log q_j with q_j = c_j / b_j, in whole blocks, then again with the maximum
  // subtracted where a block holds a sum that cannot be trusted.
  void update_columns(double eps, const T* g, const T* F, const double* c, T* gt, T* q) {
    const T to_cost = static_cast<T>(eps / kLog2E);
    const double least = least_column_sum(tilt(eps), F);
    for (int64_t begin = 0; begin < m; begin += kColumnBlock) {
      const int64_t end = std::min(m, begin + kColumnBlock);
      if (column_ratios(end - begin, c + begin, b + begin, least, q + begin)) {
        std::fill(gt + begin, gt + end, T(0));
        subtract_log2(end - begin, q + begin, gt + begin);
        for (int64_t j = begin; j < end; ++j) gt[j] = b[j] > T(0) ? g[j] + to_cost * gt[j] : T(0);
      } else {
        guarded_columns(eps, begin, end, g, F, gt, q);
      }
    }
  }

  // Column sums that are smaller may owe a digit to exponentials clamped at 2^-kExp2Limit: row i
  // adds a_i / s_i of them, times what it is tilted by. None is large enough if that was clamped.
  double least_column_sum(T tilt, const T* F) const {
    double clamped = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!(a[i] > T(0))) continue;
      double added = static_cast<double>(a[i] / (trusted(s_[i]) ? s_[i] : T(1)));
      if (tilt != T(0)) added *= static_cast<double>(fast_exp2(tilt * F[i]));
      if (tilt * F[i] > static_cast<T>(kExp2Limit)) return std::numeric_limits<double>::infinity();
      clamped += added;
    }
    return clamped * std::exp2(-kExp2Limit) /
           static_cast<double>(std::numeric_limits<T>::epsilon());
  }

  void guarded_columns(double eps, int64_t begin, int64_t end, const T* g, const T* F, T* gt,
                       T* q) {
    const T k = factor(eps), to_cost = static_cast<T>(eps / kLog2E);
    std::vector<T> A(n);
    const T damping = static_cast<T>(x.damping(eps));
    for (int64_t i = 0; i < n; ++i)
      A[i] = a[i] > T(0) ? damping * F[i] + fast_log2(a[i]) : static_cast<T>(kLog2Zero);
    T lse[kColumnBlock];
    int64_t stride = 0;
    const T* C = source_.columns(begin, end, columns_, stride);
    column_lse(ColumnLse<T>{n, end - begin, stride, k, C, A.data(), lse});
    for (int64_t j = begin; j < end; ++j) {
      gt[j] = b[j] > T(0) ? -to_cost * lse[j - begin] : T(0);
      q[j] = fast_exp2(k * (g[j] - gt[j]));
    }
  }

  // At most so many points of positive weight, evenly spread.
  static std::vector<int64_t> sample(int64_t count, const T* weight, int64_t most) {
    std::vector<int64_t> chosen;
    const int64_t wanted = std::min(count, most);
    for (int64_t i = 0; i < wanted; ++i) {
      const int64_t index = i * count / wanted;
      if (weight[index] > T(0)) chosen.push_back(index);
    }
    return chosen;
  }

  const Source& source_;
  int64_t parts_;
  BlockVector<T> G_;  // (padded m,)
  std::vector<T> s_;  // (n,)
  std::vector<Workspace> workspaces_;
  std::vector<T> columns_;  // a block of columns that was made
};

}  // namespace otloss::cpu
