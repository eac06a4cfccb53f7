"""Bugs planted in the CUDA kernels of covariance_loss: its tests on the emulator catch each.

The product that they use is broken in centred_product.py.
"""

from pathlib import Path

from planted_bugs.planting import OUTSIDE, RACE, Bug, build, copy_of_kernels

WRONG = r"(check|parts)\.h:\d+: "
OUTSIDE_OR_WRONG = f"{OUTSIDE}|{WRONG}"

MOMENTS = "column_moments.cuh"
SUM = "block_sum.cuh"
RANK = "covariance_loss_rank.cuh"
DIRECT = "covariance_loss_direct.cuh"
COMBINE = "covariance_loss_combine.cuh"
WHOLE = "covariance_loss.cuh"

BUGS = [
    # Means and squared deviations of the columns.
    Bug(
        "no barrier after the slots", MOMENTS, "block_barrier();  // all slots are there", "", RACE
    ),
    Bug("a slot too few", MOMENTS, "slot < kMomentSlots", "slot < kMomentSlots - 1", WRONG),
    Bug("a row too many", MOMENTS, "row < end ? row : 0", "row <= end ? row : 0", OUTSIDE_OR_WRONG),
    Bug("rows beyond the end count", MOMENTS, "row < end ? row : 0", "row < end ? row : 1", WRONG),
    Bug(
        "a slice reaches to the end",
        MOMENTS,
        "first + p.slice_rows < p.rows ? first + p.slice_rows : p.rows",
        "p.rows",
        WRONG,
    ),
    Bug(
        "the last slice reaches beyond the end",
        MOMENTS,
        "first + p.slice_rows < p.rows ? first + p.slice_rows : p.rows",
        "first + p.slice_rows",
        OUTSIDE_OR_WRONG,
    ),
    Bug("a slice too few", MOMENTS, "slice < p.slices", "slice < p.slices - 1", WRONG),
    Bug("slices overwrite each other", MOMENTS, "blockIdx.y * p.columns + whose", "whose", WRONG),
    Bug(
        "values count from zero",
        MOMENTS,
        "load(p.values, 0, column)",
        "0",
        WRONG,
        after="const double first = ",
    ),
    Bug(
        "the mean counts from the first value",
        MOMENTS,
        "load(p.values, 0, column) + sums.values / count",
        "sums.values / count",
        WRONG,
    ),
    Bug(
        "squares count from the first value",
        MOMENTS,
        "sums.squares - sums.values * sums.values / count",
        "sums.squares",
        WRONG,
    ),
    Bug("the mean is rounded", MOMENTS, "float(mean - high)", "0", WRONG),
    Bug(
        "a column too many",
        MOMENTS,
        "threadIdx.x >= kMomentColumns || column >= p.columns",
        "threadIdx.x >= kMomentColumns",
        OUTSIDE,
    ),
    # Sums over a block.
    Bug("no barrier after values", SUM, "block_barrier();  // all values are there", "", RACE),
    Bug(
        "no barrier after groups",
        SUM,
        "block_barrier();  // so are the sums of all groups",
        "",
        RACE,
    ),
    Bug("a group too few", SUM, "add(groups, kGroups, 1)", "add(groups, kGroups - 1, 1)", WRONG),
    # Ranks.
    Bug(
        "keys are overwritten",
        RANK,
        "block_barrier();  // nobody reads the keys before",
        "",
        RACE,
    ),
    Bug("no barrier after the keys", RANK, "block_barrier();  // all keys are there", "", RACE),
    Bug("no barrier after the counts", RANK, "block_barrier();  // all counts are there", "", RACE),
    Bug("no barrier after the ranks", RANK, "block_barrier();  // all ranks are there", "", RACE),
    Bug("equals in a block", RANK, "key - (4 * warp + e < lane)", "key", WRONG),
    Bug("equals in other blocks", RANK, "key - (first + run < first_column)", "key", WRONG),
    Bug(
        "a negative NaN is the smallest",
        RANK,
        "squares != squares ? 0x7fffffff : int(bits_of(squares))",
        "int(bits_of(squares))",
        WRONG,
    ),
    Bug("the key of no column", RANK, "column >= p.dims", "column > p.dims", OUTSIDE),
    Bug("a warp too few", RANK, "other < kRankWarps", "other < kRankWarps - 1", WRONG),
    Bug(
        "a direct column too many",
        RANK,
        "rank < kDirectColumns",
        "rank <= kDirectColumns",
        OUTSIDE_OR_WRONG,
    ),
    Bug(
        "a copy of no column",
        RANK,
        "column < p.dims",
        "true",
        OUTSIDE,
        after="const bool exists = ",
    ),
    Bug(
        "copies are not centred",
        RANK,
        "load(p.features, row, column) - p.mean[column]",
        "load(p.features, row, column)",
        WRONG,
    ),
    Bug(
        "the variance of direct columns counts twice",
        RANK,
        "count < kDirectColumns ? 0 : float(variance)",
        "float(variance)",
        WRONG,
    ),
    # Direct rows.
    Bug(
        "no barrier after the products",
        DIRECT,
        "block_barrier();  // the products of all slots are there",
        "",
        RACE,
    ),
    Bug("rows are left out", DIRECT, "row += kDirectSlots", "row += kDirectSlots + 1", WRONG),
    Bug(
        "a slot of rows too few", DIRECT, "other < kDirectSlots", "other < kDirectSlots - 1", WRONG
    ),
    Bug(
        "variances are covariances",
        DIRECT,
        "rank == i ? 0 : covariance / double(p.samples - 1)",
        "covariance / double(p.samples - 1)",
        WRONG,
    ),
    Bug("mirror images count twice", DIRECT, "rank < kDirectColumns ? 1 : 2", "2", WRONG),
    Bug("a panel reads no column", DIRECT, "column < p.dims", "true", OUTSIDE),
    # The matrix, its squares, and the loss.
    Bug(
        "no barrier before mirror images",
        COMBINE,
        "block_barrier();  // all values are there",
        "",
        RACE,
    ),
    Bug("the last part is left out", COMBINE, "block <= last", "block < last", WRONG),
    Bug(
        "above the diagonal counts too",
        COMBINE,
        "r >= p.side || r < c",
        "r >= p.side",
        OUTSIDE_OR_WRONG,
    ),
    Bug("a row beyond the matrix", COMBINE, "r >= p.side || r < c", "r < c", OUTSIDE_OR_WRONG),
    Bug("a column beyond the matrix", COMBINE, "c >= p.side || c <= r", "c <= r", OUTSIDE_OR_WRONG),
    Bug(
        "the mirror image is none",
        COMBINE,
        "lane * kSquareStride + row",
        "row * kSquareStride + lane",
        WRONG,
    ),
    Bug("mirror images do not count", COMBINE, "2 * squared", "squared", WRONG),
    Bug("variances count", COMBINE, "p.with_diagonal ? squared : 0", "squared", WRONG),
    Bug("squared lengths do not count", COMBINE, "p.with_diagonal ? squared : 0", "0", WRONG),
    Bug("no division by N - 1", COMBINE, "values[i] * p.scale", "values[i]", WRONG),
    Bug(
        "variances of direct columns are subtracted",
        COMBINE,
        "p.rank[c] >= kDirectColumns",
        "true",
        WRONG,
    ),
    Bug("direct rows are left out", COMBINE, "bounded + direct", "bounded", WRONG),
    # What the kernels are given.
    Bug(
        "direct columns stay in the matrix",
        WHOLE,
        "f.gram() ? w.rank : nullptr",
        "nullptr",
        WRONG,
    ),
    Bug(
        "variances in the gradient",
        WHOLE,
        "a.terms[0].right.zero_diagonal = true;",
        "",
        WRONG,
    ),
    Bug("variances of the rest in it", WHOLE, "a.feature_factor = w.rest_variance;", "", WRONG),
    Bug("no direct rows in it", WHOLE, "a.term_count = 2;", "", WRONG),
    Bug("half of it", WHOLE, "4 * f.scale()", "2 * f.scale()", WRONG),
    Bug("grad_loss is left out", WHOLE, "a.factor = p.grad_loss;", "", WRONG),
    Bug(
        "the workspace is not aligned",
        "workspace.cuh",
        "(count * int64_t(sizeof(T)) + 15) / 16 * 16",
        "count * int64_t(sizeof(T))",
        "misaligned",
    ),
]


def build_program(folder: Path) -> Path:
    return build(copy_of_kernels(folder, BUGS), "planted_bugs_covariance_loss.cpp")
