// A cost matrix that is kept.
#pragma once

#include "cpu/engines/rows.h"

namespace otloss::cpu {

template <typename T>
class DenseRows final : public RowSource<T> {
 public:
  DenseRows(int64_t n, int64_t m, const T* C) : n_(n), m_(m), C_(C) {}

  int64_t at_once() const override { return n_; }
  int64_t scratch() const override { return 0; }
  int64_t available(int64_t begin) const override { return (n_ - begin) * m_; }
  const T* rows(int64_t begin, int64_t /*count*/, T* /*scratch*/) const override {
    return C_ + begin * m_;
  }
  const T* columns(int64_t begin, int64_t /*end*/, std::vector<T>& /*scratch*/,
                   int64_t& stride) const override {
    stride = m_;
    return C_ + begin;
  }
  double max_cost(const T* a, const T* b) const override;

 private:
  int64_t n_, m_;
  const T* C_;  // (n, m)
};

}  // namespace otloss::cpu
