// What zca_whiten.cpp and its kernels hand to each other. For zca_whiten.cpp alone.

#pragma once

#include <cstdint>
#include <vector>

#include "aligned.h"
#include "operand.h"

namespace medmoco {
namespace {

constexpr int64_t kTileRows = 256;  // rows that are centred and multiplied at a time

// Scalar is what the operands hold, T what is computed with: float, or double for double.
template <typename T, typename Scalar>
struct Centred {
  Matrix<T, Scalar> values;
  const T* mean;  // of each column
};

template <typename T, typename Scalar>
struct Term {
  Centred<T, Scalar> rows;
  const T* matrices;  // (groups, group_size, group_size)
};

// What a thread works on at a time: rows of one group, some panels of its columns.
struct Part {
  int64_t column, group_size, first_row, last_row;
  int64_t first_panel = 0, last_panel = 0;
};

template <typename T>
struct Workspace {
  AlignedVector<T> tile, panel, product;
};

// The functions of zca_whiten.inl, compiled for one instruction set.
template <typename T, typename Scalar>
struct Kernels {
  int64_t panel_rows;
  bool (*eigh)(const T*, int64_t, int64_t, T*, T*);
  void (*sum)(const Matrix<T, Scalar>&, const Part&, double*);
  void (*moment)(const Centred<T, Scalar>&, const Centred<T, Scalar>&, bool, const Part&,
                 Workspace<T>&, T*);
  void (*compose)(const T*, const T*, int64_t, Workspace<T>&, T*);
  void (*covariance_gradient)(const T*, const T*, const T*, int64_t, int64_t, Workspace<T>&, T*);
  void (*apply)(const std::vector<Term<T, Scalar>>&, const Part&, Workspace<T>&, Scalar*, int64_t);
};

}  // namespace
}  // namespace medmoco
