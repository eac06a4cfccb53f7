"""Bugs planted in the product of centred operands: its tests on the emulator catch each.

What it shares with the other kernels (the order of fragments, the places in shared memory, the
schedule) is broken in their tests.
"""

from pathlib import Path

from planted_bugs.planting import OUTSIDE, RACE, Bug, build, copy_of_kernels

MISALIGNED = "misaligned address"
WRONG = r"moment .*: expected|result .*: expected|is found again"

OPERAND = "centred_operand.cuh"
PRODUCT = "centred_product.cuh"
MOMENT = "centred_moment.cuh"
APPLY = "centred_apply.cuh"
PRODUCTS = "products.cuh"

BUGS = [
    # Chunks on their way.
    Bug(
        "no barrier in the loop",
        PRODUCT,
        "block_barrier();  // this chunk is there, and nobody reads the one before",
        "",
        RACE,
    ),
    Bug(
        "a chunk is multiplied that is not the stored one",
        PRODUCT,
        "slot ^= 1;",
        "",
        f"{RACE}|{WRONG}",
    ),
    Bug("the right operand lies on the left one", PRODUCT, "(2 + slot)", "(1 + slot)", RACE),
    Bug("the last chunk is left out", PRODUCT, "chunk < end", "chunk + 1 < end", WRONG),
    Bug(
        "the depth of the right operand stays",
        PRODUCT,
        "right.load(term.right, batch, first_column, int64_t(chunk) * kProductDepth);",
        "right.load(term.right, batch, first_column, int64_t(first) * kProductDepth);",
        WRONG,
    ),
    Bug(
        "the warps of a row have the same columns",
        PRODUCT,
        "warp % S::kWarpsByColumns * S::kWarpColumns",
        "0",
        WRONG,
        after="const typename Right::Chunk::Reader right(",
    ),
    Bug("a chunk too few", PRODUCT, "(depth + kProductDepth - 1)", "depth", WRONG),
    Bug(
        "results beside their rows", PRODUCT, "i / 2 * 8 + lane / 4", "i % 2 * 8 + lane / 4", WRONG
    ),
    Bug(
        "sums of the last steps alone",
        PRODUCTS,
        "sums[m][n][i] += run[m][n][i];",
        "sums[m][n][i] = run[m][n][i];",
        WRONG,
    ),
    # Loads.
    Bug("a row too many", OPERAND, "r + i * kRowsAtOnce < operand.rows", "true", OUTSIDE),
    Bug(
        "four columns where fewer are left",
        OPERAND,
        "operand.in_fours() && c + 4 <= operand.columns",
        "operand.in_fours()",
        OUTSIDE,
    ),
    Bug(
        "four at a time of columns apart",
        OPERAND,
        "values.column_stride == 1",
        "true",
        WRONG,
    ),
    Bug(
        "four at a time from an odd address",
        OPERAND,
        "address % (4 * bytes_of(values.storage)) == 0",
        "true",
        MISALIGNED,
    ),
    Bug(
        "four at a time of rows that begin anywhere",
        OPERAND,
        "strides % 4 == 0",
        "true",
        MISALIGNED,
    ),
    Bug("a column too many", OPERAND, "e < left", "true", OUTSIDE),
    Bug(
        "the next matrix of a batch",
        OPERAND,
        "batch * operand.batch_stride",
        "batch",
        WRONG,
    ),
    Bug(
        "odd columns of 16-bit elements",
        OPERAND,
        "bits[e / 2] >> (e % 2 * 16)",
        "bits[e / 2]",
        WRONG,
    ),
    Bug("rows below the first", OPERAND, "place += kRowsAtOnce * m.row_stride;", "", WRONG),
    # Centring.
    Bug(
        "the mean's low part is left out",
        OPERAND,
        "four.values[e] - high.values[e] - low.values[e]",
        "four.values[e] - high.values[e]",
        WRONG,
    ),
    Bug(
        "the mean of the first matrix",
        OPERAND,
        "operand.mean_high[batch * operand.mean_batch_stride + c + e]",
        "operand.mean_high[c + e]",
        WRONG,
    ),
    Bug(
        "rows beyond the last are not zero",
        OPERAND,
        "r >= operand.rows",
        "false",
        WRONG,
    ),
    Bug(
        "a masked column too many",
        OPERAND,
        "operand.rank[c + e] < operand.least_rank",
        "operand.rank[c + e] <= operand.least_rank",
        WRONG,
    ),
    Bug(
        "the diagonal stays",
        OPERAND,
        "(operand.zero_diagonal && r == c + e)",
        "false",
        WRONG,
    ),
    # Results.
    Bug(
        "tiles beside the diagonal",
        MOMENT,
        "index - row * (row + 1) / 2",
        "index - row * (row - 1) / 2",
        WRONG,
    ),
    Bug("a part is left out", MOMENT, "block <= last", "block < last", WRONG),
    Bug("the mirror image", MOMENT, "return at(batch, column, row);", "return 0;", WRONG),
    Bug(
        "a part of another tile",
        MOMENT,
        "p.parts.part(block_id(), tile)",
        "p.parts.part(block_id(), 0)",
        WRONG,
    ),
    Bug(
        "no barrier after the last product",
        APPLY,
        "block_barrier();  // nobody multiplies any more",
        "",
        RACE,
    ),
    Bug("no barrier after the sums", APPLY, "block_barrier();  // all sums are there", "", RACE),
    Bug("a row of the output too many", APPLY, "row >= p.rows", "row > p.rows", OUTSIDE),
    Bug(
        "a column of the output too many",
        APPLY,
        "column >= p.columns",
        "false",
        f"{OUTSIDE}|{WRONG}",
    ),
    Bug("the second term is left out", APPLY, "t < p.term_count", "t < 1", WRONG),
    Bug("the factor in memory is left out", APPLY, "p.scale * *p.factor", "p.scale", WRONG),
    Bug("another matrix of the batch", APPLY, "block_id() / column_tiles / row_tiles", "0", WRONG),
    Bug(
        "what is subtracted is not centred",
        APPLY,
        "load(operand.values, row, column) - high - low",
        "load(operand.values, row, column)",
        WRONG,
    ),
]


def build_program(folder: Path) -> Path:
    return build(copy_of_kernels(folder, BUGS), "planted_bugs_centred_product.cpp")
