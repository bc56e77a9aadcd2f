// Rows in whole vector blocks, without a scalar rest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace otloss::cpu {

// Columns of one block: the widest vectors there are.
template <typename T>
constexpr int64_t kBlock = 64 / sizeof(T);

// Columns up to whole blocks. A row that has room after it is read to this width.
template <typename T>
constexpr int64_t padded(int64_t columns) {
  return (columns + kBlock<T> - 1) / kBlock<T> * kBlock<T>;
}

// Scratch that starts where a block may start: a vector that straddles two cache lines takes twice
// as long to move.
template <typename T>
struct BlockAllocator {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{64};

  BlockAllocator() = default;
  template <typename U>
  BlockAllocator(const BlockAllocator<U>&) {}  // NOLINT: as the standard asks

  T* allocate(size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), kAlignment));
  }
  void deallocate(T* p, size_t /*count*/) { ::operator delete(p, kAlignment); }
  bool operator==(const BlockAllocator&) const { return true; }
  bool operator!=(const BlockAllocator&) const { return false; }
};

template <typename T>
using BlockVector = std::vector<T, BlockAllocator<T>>;

// A BlockVector that is not cleared: for what is written before it is read.
template <typename T>
struct UnclearedAllocator : BlockAllocator<T> {
  template <typename U>
  struct rebind {
    using other = UnclearedAllocator<U>;
  };
  void construct(T* p) { ::new (static_cast<void*>(p)) T; }
};

template <typename T>
using BlockBuffer = std::vector<T, UnclearedAllocator<T>>;

// A row that must not be read past its end is done in whole blocks; what is left over is done as
// one more block that ends with the row and overlaps the one before, masked so that no column
// counts twice. (A scalar loop over the rest costs half as much as the whole row at m = 200.)

template <typename T>
struct Blocks {
  int64_t whole;  // columns in whole blocks
  int64_t tail;   // first column of the overlapping block, or m if there is none
  alignas(64) T mask[kBlock<T>];

  explicit Blocks(int64_t m) : whole(m / kBlock<T> * kBlock<T>), tail(m) {
    if (whole == m || whole == 0) return;
    tail = m - kBlock<T>;
    for (int64_t j = 0; j < kBlock<T>; ++j) mask[j] = tail + j < whole ? T(0) : T(1);
  }
};

}  // namespace otloss::cpu
