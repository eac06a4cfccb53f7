// Gradient kernel of covariance_loss, included by covariance_loss.inl.
//
// With C the covariance, V its diagonal and Z the centred features, the gradient is
// 4 / (D (N-1)) Z (C - V). In the Gram form Z C is computed as W Z + Z_d C_d: W is Z Z^T / (N-1)
// without the direct columns, Z_d the direct columns, C_d their rows of the covariance. V is
// masked in C_d and subtracted for the other columns, where it is small.

// What a task multiplies: `side` columns of some rows, where they do not lie so in memory, by a
// group of columns, in panels.
template <typename T>
struct GradientOperands {
  int64_t side;
  AlignedVector<T> left, right;
  AlignedVector<T> direct_rows;  // of the covariance, [direct][lane] for each panel

  GradientOperands(int64_t side, bool gram)
      : side(side),
        left(gram ? 0 : kTile * side),
        right(kGradientColumns * side),
        direct_rows(gram ? kGradientColumns * kDirectColumns : 0) {}

  T* panel(int64_t index) { return right.data() + index * kPanelRows<T> * side; }
  T* direct_panel(int64_t index) {
    return direct_rows.data() + index * kPanelRows<T> * kDirectColumns;
  }
};

template <typename T, typename Scalar>
void load_group(const Gradient<T, Scalar>& gradient, Extent columns,
                GradientOperands<T>& operands) {
  const Features<T, Scalar>& features = gradient.features;
  const int64_t side = features.side();
  for (int64_t p = 0; p < columns.parts(kPanelRows<T>); ++p) {
    const Extent lanes = columns.part(p, kPanelRows<T>);
    T* panel = operands.panel(p);
    if (features.gram()) {
      copy_centred(features, features.rows(), lanes, panel, kPanelRows<T>, 1);
      multiply_direct(features, lanes.start, panel, operands.direct_panel(p));
    } else {
      for (int64_t i = 0; i < side; ++i) {
        std::memcpy(panel + i * kPanelRows<T>, gradient.matrix + i * side + lanes.start,
                    lanes.size * sizeof(T));
      }
      for (int64_t lane = 0; lane < lanes.size; ++lane) {
        panel[(lanes.start + lane) * kPanelRows<T> + lane] = 0;
      }
    }
  }
}

// The Gram form's terms besides W Z, for the rows that `out` holds.
template <typename T, typename Scalar>
void add_direct(const Features<T, Scalar>& features, Extent rows, Extent lanes, const T* panel,
                const T* direct_rows, T* out) {
  using Vector = typename LanesOf<T>::Vector;
  multiply_stretches<T, true>(features.direct_values.data() + rows.start, rows.size,
                              features.samples, direct_rows, features.direct.size(), out);
  alignas(64) T variance[kPanelRows<T>] = {};
  for (int64_t lane = 0; lane < lanes.size; ++lane) {
    const int64_t column = lanes.start + lane;
    if (!features.is_direct(column)) variance[lane] = T(features.variance[column]);
  }
  for (int v = 0; v < kPanelVectors; ++v) {
    const Vector factor = load(variance + v * kLanes<T>);
    for (int64_t m = 0; m < rows.size; ++m) {
      const int64_t offset = m * kPanelRows<T> + v * kLanes<T>;
      const Vector centred = load(panel + rows.start * kPanelRows<T> + offset);
      store(out + offset, load(out + offset) - factor * centred);
    }
  }
}

// kGradientRows rows by kGradientColumns columns of the gradient a task.
template <typename T, typename Scalar>
void gradient_kernel(const Gradient<T, Scalar>& gradient, Tasks& tasks) {
  const Features<T, Scalar>& features = gradient.features;
  const int64_t side = features.side();
  GradientOperands<T> operands(side, features.gram());
  AlignedVector<T> out(kTile * kPanelRows<T>);
  for (int64_t task; tasks.take(task);) {
    const auto [rows, columns] = gradient.extents(task);
    load_group(gradient, columns, operands);
    for (int64_t index = 0; index < rows.parts(kTile); ++index) {
      const Extent part = rows.part(index, kTile);
      const T* left = gradient.matrix + part.start * side;
      if (!features.gram()) {
        copy_centred(features, part, features.columns(), operands.left.data(), side, 1);
        left = operands.left.data();
      }
      for (int64_t p = 0; p < columns.parts(kPanelRows<T>); ++p) {
        const Extent lanes = columns.part(p, kPanelRows<T>);
        const T* panel = operands.panel(p);
        std::memset(out.data(), 0, out.size() * sizeof(T));
        multiply_stretches<T, false>(left, part.size, side, panel, side, out.data());
        if (features.gram()) {
          add_direct(features, part, lanes, panel, operands.direct_panel(p), out.data());
        }
        for (int64_t m = 0; m < part.size; ++m) {
          Scalar* to = gradient.output + (part.start + m) * features.dims + lanes.start;
          for (int64_t lane = 0; lane < lanes.size; ++lane) {
            to[lane] = static_cast<Scalar>(out[m * kPanelRows<T> + lane] * gradient.scale);
          }
        }
      }
    }
  }
}
