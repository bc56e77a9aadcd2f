// One thread's part of a pass over the plan: leaves of x one after the other, each with the leaves
// of y that hold something of its rows.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/multiscale/moments.h"
#include "cpu/multiscale/partners.h"
#include "cpu/multiscale/tiles.h"
#include "cpu/parallel.h"

namespace otloss::cpu::multiscale {

// What the workers of a pass share.
struct Pass {
  double k;  // log2(e) / eps
  View x, y;
  Planes* planes;                           // of x, fitted again to leaves whose guess was poor
  const double* G;                          // (m,) k g
  double* F;                                // (n,) in: guess, out: exact, or fixed
  double* s;                                // (n,) row sums at the guess
  double* tiles;                            // (supers of x,) out: that were kept
  double tilt;                              // columns are those of the plan of (1 + tilt) F
  bool columns;                             // whether column sums are wanted
  int64_t group;                            // points of Newton's groups, 0: not wanted
  float threshold, slack, moments, single;  // see Search
  // From an earlier search:
  bool listed, record;   // whether lists are used, are made
  const float* rise;     // (leaves of x,) by which densities have risen, log2, at most
  const uint8_t* risen;  // (supers of y,) that are searched anew
  bool scaled = false;   // see Search
};

// The plan summed over groups of rows and of columns, in runs of a leaf's column groups.
struct GroupSums {
  int64_t per = 0;            // groups of a leaf
  std::vector<int64_t> end;   // (row groups,)
  std::vector<int32_t> leaf;  // (runs,) of columns
  std::vector<float> value;   // (runs, per)
  std::vector<double> row;    // (row groups,) row sums

  void clear() { end.clear(), leaf.clear(), value.clear(), row.clear(); }
};

class Worker {
 public:
  std::vector<double> column;          // (m,) sums
  std::vector<double> column_product;  // (leaves, d, L) of products
  GroupSums groups;
  double rounding = 0;  // an estimate of the part by which row sums are off
  double left_out = 0;  // bound of the part of the plan that was left out

  // Rows of supers [begin, end).
  void update(const Pass& pass, int64_t begin, int64_t end);
  // The time that the sums over rows of supers [begin, end) would take, in entries of the plan.
  double effort(const Pass& pass, int64_t begin, int64_t end);
  // Of a symmetric plan: s alone, a pair of leaves and its mirror image at once, which is in
  // `column`.
  void mirror(const Pass& pass, int64_t begin, int64_t end);
  // At fixed potentials rows' sum e and sum e (y - c), c the centre of the row's leaf; in `column`
  // and `column_product` the columns', weight (n,) in place of their rows'. symmetric: with half of
  // the pairs.
  void products(const Pass& pass, int64_t begin, int64_t end, bool symmetric, const double* weight,
                double* sum, double* product);
  // At fixed potentials w = base + factor sum a e x, and in `column` sum a w e, if wanted: x
  // (m,), or null: 0, base (n,) likewise.
  void product(const Pass& pass, int64_t begin, int64_t end, const double* x, const double* base,
               const double* factor, double* w);
  // At fixed potentials the pairs of leaves that are kept: each(leaf of x, tiles, their number).
  void pairs(const Pass& pass, int64_t begin, int64_t end,
             FunctionRef<void(int64_t, const Tile*, int64_t)> each);
  double missing() const { return missing_; }
  // At fixed potentials rows' sum e v: v (count, m), out (count, n).
  void values(const Pass& pass, int64_t begin, int64_t end, int64_t count, const double* v,
              double* out);

 private:
  void for_each_leaf(const Pass& pass, int64_t begin, int64_t end, FunctionRef<void(int64_t)> leaf);
  double tilted(int64_t first, int64_t last) const;
  void find_supers(int64_t S, bool all);
  void find(int64_t I, bool anew, int64_t least);
  MomentRows moment_rows(int64_t I, bool products);
  TileRows tile_rows(int64_t I, int64_t first, float* sum);

  void update_leaf(int64_t I);
  bool correct(int64_t I, int64_t first, const float* sum);
  void take(int64_t I, int64_t first, const float* sum, const double* guess);
  void dense_row(int64_t i, double guess);
  void flush(int64_t I, double unit);
  void add_groups();
  void add_columns(int64_t skipped, double unit);
  double gather(const double* v, float* values) const;
  void products_leaf(int64_t I, bool symmetric, const double* weight, double* sum, double* product);

  const Pass* pass_ = nullptr;
  int64_t L_ = 0, d_ = 0;
  Search search_{};
  Found found_{};
  int64_t direct_ = 0;  // tiles without moments
  // Supers of y that may matter to super super_ of x: of all, or of those that have risen.
  int64_t super_ = -1;
  bool all_ = false;
  std::vector<int32_t> supers_;
  double supers_left_out_ = 0;
  std::vector<Tile> tiles_;
  BlockVector<float> alpha_, beta_, U_, e_, bound_;
  BlockVector<float> w_, row_, row_product_;  // (L,), (L,), (d, L) of the leaf
  BlockVector<float> sums_, products_;        // (tiles, L), (tiles, d, L) of its columns
  BlockVector<float> values_;                 // (., tiles, L) that e are multiplied with
  std::vector<double> dense_;
  double mass_ = 0;     // of the rows in sums_
  double missing_ = 0;  // bound of what sums of the leaf's rows lack
  // Lists of the leaves from first_ on, and what was left out of them.
  int64_t first_ = 0;
  std::vector<int64_t> list_begin_;
  std::vector<int32_t> list_;
  std::vector<double> list_left_out_;
};

}  // namespace otloss::cpu::multiscale
