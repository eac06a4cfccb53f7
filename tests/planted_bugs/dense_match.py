"""Bugs planted in the CUDA kernel of dense_match: its tests on the emulator catch each.

What it shares with queue_info_nce (the order of fragments, rounding, the schedule) is broken there.
"""

from pathlib import Path

from planted_bugs.planting import OUTSIDE, RACE, Bug, build, copy_of_kernels

WRONG = (
    "expected (index|similarity|a key|NaN|a NaN)|no index|(index|similarity|index of .*): expected"
)
BEFORE = "AddressSanitizer: use-after-poison"

FORWARD = "dense_match_forward.cuh"
FOUND = "dense_match_found.cuh"
PRODUCTS = "dense_match_products.cuh"
COMBINE = "dense_match_combine.cuh"
CHUNK = "map_chunk.cuh"
MAP = "feature_map.cuh"
LOOP = """block_barrier();  // this chunk has arrived, and nobody reads the one before
      copies.start(p, image, first_query, chunks, end);"""
START = "copies.start(p, image, first_query, chunks, end);"
UNALIGNED = "struct MapChunk<Element, MapLayout::kUnaligned, kPositions> {"

BUGS = [
    # Barriers.
    Bug("no barrier in the loop", FORWARD, LOOP, START, RACE),
    Bug("a copy before the barrier", FORWARD, LOOP, START + " block_barrier();", RACE),
    Bug(
        "no barrier after the squares of keys",
        FORWARD,
        "block_barrier();  // squares are there, and nobody reads chunks or the scales before",
        "",
        RACE,
    ),
    Bug(
        "no barrier after the scales of keys",
        FORWARD,
        "block_barrier();  // all scales are there",
        "",
        RACE,
    ),
    Bug(
        "no barrier after the candidates",
        FORWARD,
        "block_barrier();  // all candidates and the squares of the queries are there",
        "",
        RACE,
    ),
    # Copies and the ring.
    Bug("no wait for a chunk", FORWARD, "cp_async_wait<S::kStages - 2>();", "", RACE),
    Bug(
        "the wait for a chunk is one group short",
        FORWARD,
        "cp_async_wait<S::kStages - 2>();",
        "cp_async_wait<S::kStages - 1>();",
        RACE,
    ),
    Bug(
        "no group where no chunk is left",
        FORWARD,
        "cp_async_commit();  // also without a chunk, so that the groups keep count",
        "if (tile < end_tile) cp_async_commit();",
        RACE,
    ),
    Bug(
        "copies of keys are a stage behind",
        FORWARD,
        "S::KeyChunk::copy(window, shared.key_chunk(slot), p.found);",
        "S::KeyChunk::copy(window, shared.key_chunk((slot + 1) % S::kStages), p.found);",
        RACE,
    ),
    Bug(
        "keys are read a stage behind",
        FORWARD,
        "shared.key_chunk(slot)",
        "shared.key_chunk((slot + 1) % S::kStages)",
        RACE,
        after="const typename S::KeyChunk::Reader key(",
    ),
    Bug(
        "queries are copied again while they are read",
        FORWARD,
        "!resident || tile == first_tile",
        "true",
        RACE,
    ),
    Bug(
        "queries that pass by are copied for one tile alone",
        FORWARD,
        "!resident || tile == first_tile",
        "tile == first_tile",
        WRONG,
    ),
    Bug(
        "the copy stays at the first chunk",
        FORWARD,
        "int64_t(chunk) * kChunkDepth<Element>",
        "0",
        WRONG,
    ),
    Bug(
        "the copy stays at the first tile",
        FORWARD,
        "int64_t(tile) * S::kKeys",
        "int64_t(first_tile) * S::kKeys",
        WRONG,
        after="S::QueryChunk::copy(",
    ),
    # Bounds.
    Bug("a key too many", FORWARD, "thread < keys_left", "thread <= keys_left", WRONG),
    Bug("a key too few", FORWARD, "thread < keys_left", "thread < keys_left - 1", WRONG),
    Bug(
        "an aligned position too many",
        CHUNK,
        "chunks_of<Element>(window.positions)",
        "chunks_of<Element>(window.positions + 1)",
        OUTSIDE,
    ),
    Bug(
        "an aligned channel too many",
        CHUNK,
        "chunks_of<Element>(window.channels)",
        "chunks_of<Element>(window.channels + 1)",
        OUTSIDE,
    ),
    Bug(
        "an unaligned channel too few",
        CHUNK,
        "row < window.channels",
        "row < window.channels - 1",
        WRONG,
    ),
    Bug(
        "the end of unaligned positions is left out",
        CHUNK,
        "from < row_begin + bytes",
        "from + 16 < row_begin + bytes",
        WRONG,
    ),
    Bug(
        "a chunk across the end of a map",
        CHUNK,
        "from >= begin && from + 16 <= end",
        "from >= begin && from < end",
        OUTSIDE,
    ),
    Bug(
        "a chunk across the beginning of a map",
        CHUNK,
        "from >= begin && from + 16 <= end",
        "from + 16 <= end",
        BEFORE,
    ),
    Bug("an element behind a map", CHUNK, "from + byte < end", "from + byte <= end", OUTSIDE),
    Bug(
        "an element before a map",
        CHUNK,
        "from + byte >= begin",
        "from + byte + kSize >= begin",
        BEFORE,
    ),
    Bug(
        "a query too many",
        COMBINE,
        "query < p.batch * p.query.positions",
        "query <= p.batch * p.query.positions",
        OUTSIDE,
    ),
    Bug("padding is not zero", MAP, "column < columns", "column <= columns", f"{OUTSIDE}|{WRONG}"),
    # Fragments.
    Bug(
        "channels of the left operand",
        CHUNK,
        "T{offset}.place(lane % 8 + lane / 16 * 8, lane / 8 % 2) ^ chunks",
        "T{offset}.place(lane % 8 + lane / 8 % 2 * 8, lane / 16) ^ chunks",
        WRONG,
    ),
    Bug(
        "positions of a warp, 16-bit",
        CHUNK,
        "T{offset}.place(lane % 16, lane / 16) ^ chunks",
        "T{offset}.place(lane % 16, lane / 16)",
        WRONG,
    ),
    Bug(
        "positions of a warp, 32-bit",
        CHUNK,
        "(T{offset}.place(lane % 4, lane / 16) + lane / 4 % 4 * 4) ^ chunks",
        "(T{offset}.place(lane % 4, lane / 16) + lane / 4 % 4 * 4)",
        WRONG,
    ),
    Bug("the swizzle of the other chunk", CHUNK, "chunk * T::kChunkElements * 2", "0", WRONG),
    Bug(
        "the rows of the other chunk",
        CHUNK,
        "4 * chunk * T::kRowBytes",
        "0",
        WRONG,
        after="const auto* row = ",
    ),
    Bug(
        "positions of a warp, channels last", CHUNK, "first_position * kChunkDepthBytes", "0", WRONG
    ),
    Bug(
        "where unaligned rows begin", CHUNK, "((head + row * head_step) & 15)", "(head & 15)", WRONG
    ),
    Bug(
        "channels of unaligned 16-bit operands",
        CHUNK,
        "at(row + 1, position)",
        "at(row, position)",
        WRONG,
    ),
    Bug("channels of an unaligned step", CHUNK, "8 * step + 4 * chunk", "8 * step", WRONG),
    Bug(
        "left rows, unaligned",
        CHUNK,
        "raw[i] = load(step, i / 2, 16 * m + i % 2 * 8);",
        "raw[i] = load(step, i % 2, 16 * m + i / 2 * 8);",
        WRONG,
        after=UNALIGNED,
    ),
    # Lengths.
    Bug(
        "both warps add the squares of queries",
        PRODUCTS,
        "with_query_squares && step % 2 == warp % 2",
        "with_query_squares",
        WRONG,
    ),
    Bug(
        "both warps add the squares of keys",
        PRODUCTS,
        "step % 2 == warp / 2",
        "step % 2 == 0",
        WRONG,
    ),
    Bug("squares of another query", PRODUCTS, "2 * m + i % 2", "2 * m + i / 2", WRONG),
    Bug("squares of another key", PRODUCTS, "n + i / 2", "n + i % 2", WRONG),
    Bug(
        "a tiny vector passes for zeros",
        PRODUCTS,
        "(one.seen | other.seen) == 0",
        "square == 0",
        WRONG,
    ),
    Bug(
        "any length is taken", PRODUCTS, "square >= 0x1p-100f && square <= 0x1p100f", "true", WRONG
    ),
    Bug(
        "an infinite length is taken",
        PRODUCTS,
        "square >= 0x1p-100f && square <= 0x1p100f",
        "square >= 0x1p-100f",
        WRONG,
    ),
    # The best.
    Bug(
        "the last of equal tiles",
        FORWARD,
        "!(most[line] > best.score[line])",
        "!(most[line] >= best.score[line])",
        WRONG,
    ),
    Bug(
        "the last of a lane's equals",
        FORWARD,
        "score == most[line]",
        "score == most[line] && position == 0",
        WRONG,
    ),
    Bug(
        "the last of equal lanes",
        FORWARD,
        "a.position < b.position",
        "a.position > b.position",
        WRONG,
    ),
    Bug(
        "positions without the tile",
        FORWARD,
        "int(first_key) + first + position",
        "first + position",
        WRONG,
    ),
    Bug(
        "an irregular key passes", FORWARD, "best.irregular |= key.factor != key.factor;", "", WRONG
    ),
    Bug(
        "an irregular key is known to its lane alone",
        FORWARD,
        "warp_any(best.irregular)",
        "best.irregular",
        WRONG,
    ),
    Bug(
        "an irregular key is known to its warp alone",
        FORWARD,
        "chosen.position >= 0 && other.position >= 0",
        "chosen.position >= 0",
        WRONG,
    ),
    Bug(
        "the highest of equal positions",
        FOUND,
        "uint32_t(~position)",
        "position",
        WRONG,
    ),
    Bug(
        "negative scores are not ordered",
        FOUND,
        "bits >> 31 ? ~bits : bits | 0x80000000u",
        "bits ^ 0x80000000u",
        "score|index",
    ),
    Bug("-0 is below 0", FOUND, "bits_of(score + 0.0f)", "bits_of(score)", "expected -0 to be 0"),
    Bug(
        "a negative NaN is the worst",
        FOUND,
        "if (score != score) bits = 0x7fc00000u;",
        "",
        "any NaN|score",
    ),
    # Parts and their choice.
    Bug("the last part is left out", COMBINE, "block <= last", "block < last", WRONG),
    Bug(
        "the lowest part stays",
        COMBINE,
        "match > chosen.best ? match : chosen.best",
        "chosen.best",
        WRONG,
    ),
    Bug(
        "an irregular query passes",
        COMBINE,
        "chosen.inverse_length != chosen.inverse_length",
        "false",
        WRONG,
    ),
    Bug(
        "the length of a query is left out",
        COMBINE,
        "score_of(chosen.best) * chosen.inverse_length",
        "score_of(chosen.best)",
        WRONG,
    ),
    Bug(
        "similarity may leave its range",
        COMBINE,
        "cosine > 1 ? 1.0f : cosine < -1 ? -1.0f : cosine",
        "cosine",
        WRONG,
    ),
    Bug("the care is for another query", COMBINE, "query - lane + turn", "query", WRONG),
    Bug(
        "no care for the range of squares",
        COMBINE,
        "float_of((254 - bounded) << 23)",
        "1.0f",
        WRONG,
    ),
    Bug(
        "lanes do not agree on the best", COMBINE, "best = other > best ? other : best;", "", WRONG
    ),
    Bug(
        "careful sums lose channels",
        COMBINE,
        "start + kStretch < p.channels ? start + kStretch : p.channels",
        "start + kStretch < p.channels ? start + kStretch : start",
        WRONG,
    ),
]


def build_program(folder: Path) -> Path:
    return build(copy_of_kernels(folder, BUGS), "planted_bugs_dense_match.cpp")
