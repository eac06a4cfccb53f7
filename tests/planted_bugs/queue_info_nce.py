"""Bugs planted in the CUDA kernel of queue_info_nce: its tests on the emulator catch each."""

import re
from pathlib import Path

from planted_bugs.planting import OUTSIDE, RACE, Bug, build, copy_of_kernels

WRONG = "expected (an error of the|a rank from|a loss of|a direction of)|rank: expected"
NAN = "got -?nan"

FORWARD = "queue_info_nce_forward.cuh"
SOFTMAX = "queue_info_nce_softmax.cuh"
COMBINE = "queue_info_nce_combine.cuh"
LOOP = """block_barrier();  // all copies of this tile have arrived, and nobody reads the one before
    start_copy(tile + S::kStages - 1);"""
TF32_RESULTS = (
    "left({bits_of(result[0]), bits_of(result[2]), bits_of(result[1]), bits_of(result[3])})"
)
TF32_UNORDERED = (
    "left({bits_of(result[0]), bits_of(result[1]), bits_of(result[2]), bits_of(result[3])})"
)
PARTS = "block <= parts.last_block"

BUGS = [
    # Barriers.
    Bug(
        "no barrier before a part",
        FORWARD,
        "block_barrier();  // the part before is done with the shared memory",
        "",
        RACE,
    ),
    Bug(
        "no barrier after the queries",
        FORWARD,
        "block_barrier();  // all copies of the queries have arrived",
        "",
        RACE,
    ),
    Bug("no barrier in the loop", FORWARD, LOOP, "start_copy(tile + S::kStages - 1);", RACE),
    Bug(
        "a copy before the barrier",
        FORWARD,
        LOOP,
        "start_copy(tile + S::kStages - 1); block_barrier();",
        RACE,
    ),
    Bug(
        "no barrier before columns are shared",
        COMBINE,
        "block_barrier();  // the columns before have been read",
        "",
        RACE,
    ),
    Bug(
        "no barrier after columns are shared",
        COMBINE,
        "block_barrier();",
        "",
        RACE,
        after="shared_store(shares",
    ),
    # Copies and the ring.
    Bug("no wait for the queries", FORWARD, "cp_async_wait<S::kStages - 1>();", "", RACE),
    Bug(
        "the wait for the queries is one group short",
        FORWARD,
        "cp_async_wait<S::kStages - 1>();",
        "cp_async_wait<S::kStages>();",
        RACE,
    ),
    Bug("no wait for a tile", FORWARD, "cp_async_wait<S::kStages - 2>();", "", RACE),
    Bug(
        "the wait for a tile is one group short",
        FORWARD,
        "cp_async_wait<S::kStages - 2>();",
        "cp_async_wait<S::kStages - 1>();",
        RACE,
    ),
    Bug(
        "no group where no tile is left",
        FORWARD,
        "cp_async_commit();  // also without a tile, so that the groups keep count",
        "if (tile < end()) cp_async_commit();",
        RACE,
    ),
    Bug(
        "copies are a stage too near",
        FORWARD,
        LOOP,
        "block_barrier(); start_copy(tile + S::kStages - 2);",
        RACE,
    ),
    Bug("keys go to the wrong stage", FORWARD, "M::keys(tile)", "M::keys(tile + 1)", WRONG),
    Bug(
        "ids go to the wrong stage", FORWARD, "M::queue_ids(tile)", "M::queue_ids(tile + 1)", WRONG
    ),
    # Bounds.
    Bug("a row too many", "tile.cuh", "rows.count - first", "rows.count - first + 1", OUTSIDE),
    Bug("a row too few", "tile.cuh", "rows.count - first", "rows.count - first - 1", WRONG),
    Bug("a chunk too many", "tile.cuh", "chunk < rows.chunks", "chunk <= rows.chunks", OUTSIDE),
    Bug("a chunk too few", "tile.cuh", "chunk < rows.chunks", "chunk < rows.chunks - 1", WRONG),
    Bug("a row of keys too many", FORWARD, "key < p.key.count", "key <= p.key.count", OUTSIDE),
    Bug(
        "a chunk of a key too many",
        FORWARD,
        "chunk < p.key.chunks",
        "chunk <= p.key.chunks",
        OUTSIDE,
    ),
    Bug("a negative too many", SOFTMAX, "key < keys_left", "key <= keys_left", WRONG),
    Bug("a negative too few", SOFTMAX, "key < keys_left", "key < keys_left - 1", WRONG),
    Bug("a query too many", COMBINE, "query < p.batch", "query <= p.batch", OUTSIDE),
    Bug(
        "parts have two columns too many",
        FORWARD,
        "column >= p.direction_dim",
        "column > p.direction_dim",
        WRONG,
    ),
    Bug(
        "a column too many",
        COMBINE,
        "column + i < p.embed_dim",
        "column + i <= p.embed_dim",
        f"{OUTSIDE}|{WRONG}",
    ),
    Bug("padding is not zero", "rows.cuh", "column < rows.dim", "column <= rows.dim", OUTSIDE),
    # Fragments and the swizzle.
    Bug("chunks of an operand", "tile.cuh", "2 * step", "step", WRONG),
    Bug(
        "halves of the left operand",
        "tile.cuh",
        "lane / 16",
        "1 - lane / 16",
        WRONG,
        after="return tile.place(lane % 16, ",
    ),
    Bug(
        "rows of the right operand",
        "tile.cuh",
        "tile.place(lane % 8 + lane / 16 * 8, lane / 8 % 2)",
        "tile.place(lane % 8 + lane / 8 % 2 * 8, lane / 16)",
        WRONG,
    ),
    Bug("rows of 16-bit values", "tile.cuh", "16 * step", "8 * step", WRONG),
    Bug("columns of 16-bit values", "tile.cuh", "2 * pair_of_columns", "pair_of_columns", WRONG),
    Bug("rows of float32 values", "tile.cuh", "lane % 4 * 2", "lane % 4", WRONG),
    Bug("second row of float32 values", "tile.cuh", "i % 2 * T::kRowBytes", "0", WRONG),
    Bug("columns of float32 values", "tile.cuh", "i / 2 * 2 + i % 2", "i / 2 * 2", WRONG),
    Bug(
        "results as 16-bit operand",
        "operands.cuh",
        "pack<Scalar>(near[2], near[3])",
        "pack<Scalar>(far[0], far[1])",
        WRONG,
    ),
    Bug(
        "order of two 16-bit results",
        "operands.cuh",
        "pack<Scalar>(near[0], near[1])",
        "pack<Scalar>(near[1], near[0])",
        WRONG,
    ),
    Bug(
        "results as TF32 operand",
        "operands.cuh",
        TF32_RESULTS,
        TF32_UNORDERED,
        WRONG,
        after="struct Tf32 {",
    ),
    Bug(
        "results as 3xTF32 operand",
        "operands.cuh",
        TF32_RESULTS,
        TF32_UNORDERED,
        WRONG,
        after="struct Tf32x3 {",
    ),
    Bug(
        "rows are written without the swizzle",
        "tile.cuh",
        "tile.place(first_row + i, chunk)",
        "tile.place(0, chunk) + (first_row + i) * T::kRowBytes",
        WRONG,
    ),
    Bug("the diagonal of query . key", FORWARD, "pair == row / 2", "pair == row % 4", WRONG),
    # Rounding.
    Bug(
        "TF32 operands are truncated",
        "operands.cuh",
        "return round_to_tf32(float_of(raw));",
        "return raw;",
        "expected the loss of operands that have been rounded before",
    ),
    Bug(
        "3xTF32 without the low parts",
        "operands.cuh",
        "low = round_to_tf32(value - float_of(high));",
        "low = 0;",
        WRONG,
    ),
    Bug(
        "3xTF32 with a truncated high part",
        "operands.cuh",
        "high = round_to_tf32(value);",
        "high = raw;",
        WRONG,
    ),
    Bug(
        "3xTF32 with two products",
        "operands.cuh",
        "Tf32::multiply_add(sum, a.high, b.low);",
        "",
        WRONG,
    ),
    # The softmax.
    Bug(
        "rescaling the wrong way",
        SOFTMAX,
        "exp2_fast(gathered.peak[line] - peak)",
        "exp2_fast(peak - gathered.peak[line])",
        f"{NAN}|inf",
    ),
    Bug("the sum is not rescaled", SOFTMAX, "gathered.sum[line] *= factor;", "", WRONG),
    Bug(
        "the direction is not rescaled",
        SOFTMAX,
        "gathered.direction[line / 2][n][line % 2 * 2] *= factor;",
        "",
        WRONG,
    ),
    Bug(
        "lanes of a query disagree on its peak",
        SOFTMAX,
        "largest[line] = fmaxf(largest[line], shuffle_xor(largest[line], 2));",
        "",
        WRONG,
    ),
    Bug("a peak that is outgrown stays", SOFTMAX, "warp_any(outgrown)", "false", f"{NAN}|inf"),
    Bug(
        "a tie is below the key",
        SOFTMAX,
        "count_unless_below(gathered.rank[line], logits[m][n][i], positive[line]);",
        "gathered.rank[line] += !(logits[m][n][i] <= positive[line]);",
        "rank: expected 4.0*, got 0",
    ),
    Bug(
        "what is left out counts in the rank of a NaN",
        SOFTMAX,
        "if (!(kNothing < positive[line])) gathered.rank[line] -= count_bits(out[line]);",
        "",
        "rank: expected 68",
    ),
    Bug(
        "ids match in their lower halves",
        SOFTMAX,
        "id != shared_load(M::query_ids() + row + 8 * line)",
        "int(id) != int(shared_load(M::query_ids() + row + 8 * line))",
        WRONG,
    ),
    Bug("negative ids match", SOFTMAX, "id < 0", "false", WRONG),
    Bug(
        "ids of the second query of a lane are not looked at",
        SOFTMAX,
        "equal |= id == of_queries[line];",
        "equal |= line == 0 && id == of_queries[line];",
        WRONG,
    ),
    # Parts and their combination.
    Bug("parts collide", "schedule.cuh", "block + query_tile", "block", WRONG),
    Bug(
        "each part begins with the queue",
        "schedule.cuh",
        "first > 0 ? int(first) : 0",
        "0 * int(first)",
        WRONG,
    ),
    Bug(
        "a part of the next tile of queries is combined",
        "schedule.cuh",
        "(query_tile + 1) * queue_tiles - 1",
        "(query_tile + 1) * queue_tiles",
        WRONG,
    ),
    Bug(
        "the sums of parts are not rescaled",
        COMBINE,
        "found.sum * exp2_fast(found.peak - total.peak)",
        "found.sum",
        WRONG,
    ),
    Bug(
        "the directions of parts are not rescaled",
        COMBINE,
        "exp2_fast(peaks[i] - peak)",
        "1.0f",
        WRONG,
    ),
    Bug(
        "the last part counts again and again",
        COMBINE,
        "first + i * p.warps_per_query <= parts.last_block",
        "true",
        WRONG,
    ),
    Bug(
        "the sum of the last part is left out",
        COMBINE,
        PARTS,
        "block < parts.last_block",
        WRONG,
        after="total.peak = warp_max(total.peak);",
    ),
    Bug(
        "the direction of the last part is left out",
        COMBINE,
        "first <= parts.last_block",
        "first < parts.last_block",
        WRONG,
    ),
    Bug(
        "the share of the last warp is left out",
        COMBINE,
        "other < p.warps_per_query",
        "other + 1 < p.warps_per_query",
        WRONG,
    ),
    Bug("the positive gets no share", COMBINE, "-expm1f(-loss)", "1.0f", WRONG),
]


def build_program(folder: Path) -> Path:
    sources = copy_of_kernels(folder, BUGS)
    # One width, to build faster.
    path = sources / "cuda/queue_info_nce.cuh"
    widths = re.compile(r"if \(embed_dim <= 64\) (return .*;)\n.*<128>.*\n.*<256>.*;")
    text, count = widths.subn(r"\1", path.read_text())
    assert count == 1
    path.write_text(text)
    return build(sources, "planted_bugs_queue_info_nce.cpp")
