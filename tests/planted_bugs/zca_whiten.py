"""Bugs planted in the CUDA kernels of zca_whiten: its tests on the emulator catch each.

What it shares with covariance_loss (means, products of centred operands) is broken there.
"""

from pathlib import Path

from planted_bugs.planting import OUTSIDE, RACE, Bug, build, copy_of_kernels

WRONG = "expected (a smaller error|NaN|a finite|eigenvalues|the matrix|orthogonal)"
BEYOND = "out of bounds: shared bytes"

EIGH = "eigh.cuh"
PRODUCTS = "zca_whiten_products.cuh"
MATRIX = "zca_whiten_matrix.cuh"
GRADIENT = "zca_whiten_gradient.cuh"
LAUNCH = "zca_whiten.cuh"

BARRIERS = [  # and what would be read or written too early without them
    (EIGH, "the matrix is there"),
    (EIGH, "nobody reads the diagonal that was"),
    (EIGH, "for the first round"),
    (EIGH, "rotations are there"),
    (EIGH, "nobody reads them, and the next may be chosen"),
    (EIGH, "all flags are there"),
    (PRODUCTS, "all have read the operands, one of which the result may replace"),
    (PRODUCTS, "the result is there"),
    (MATRIX, "scales are there"),
    (GRADIENT, "both are there"),
]

BUGS = [
    *(
        Bug(f"no barrier: {why}", file, f"block_barrier();  // {why}", "", RACE)
        for file, why in BARRIERS
    ),
    # Rotations.
    Bug(
        "a pair meets itself",
        EIGH,
        "behind < 0 ? behind + players : behind",
        "behind < 0 ? -behind : behind",
        f"{RACE}|{WRONG}",
    ),
    Bug(
        "the angle beyond 45 degrees",
        EIGH,
        "difference < 0 ? difference - root : difference + root",
        "difference + root",
        WRONG,
    ),
    Bug(
        "the wrong way",
        EIGH,
        "fmaf(-tangent, coupling, here)",
        "fmaf(tangent, coupling, here)",
        WRONG,
    ),
    Bug("a turn that is none", EIGH, "fmaf(-half_tangent, y, old)", "old", WRONG),
    Bug("rows are not turned", EIGH, "left.turn(b, d);", "", WRONG),
    Bug("columns are not turned", EIGH, "right.turn(c, d);", "", WRONG),
    Bug("vectors are not turned", EIGH, "left.turn(f, h);", "", WRONG),
    Bug(
        "the diagonal is turned twice",
        EIGH,
        "if (row == column) continue;  // see choose_rotation",
        "",
        WRONG,
    ),
    Bug(
        "small rotations are left out",
        EIGH,
        "fabsf(coupling) > kNoise",
        "fabsf(coupling) > 0x1p-12f",
        WRONG,
    ),
    Bug(
        "the last round alone tells of convergence",
        EIGH,
        "rotated |= choose_rotation(shared, round);",
        "rotated = choose_rotation(shared, round);",
        WRONG,
    ),
    Bug("lanes do not agree on the largest", EIGH, "shuffle_xor(largest, mask)", "largest", WRONG),
    Bug("a tiny matrix is not scaled", EIGH, "float_of((254 - bounded) << 23)", "1.0f", WRONG),
    Bug(
        "a huge matrix is scaled to nothing",
        EIGH,
        "exponent > 253 ? 253 : exponent",
        "exponent",
        WRONG,
    ),
    # Products.
    Bug(
        "rows beyond the matrix are read",
        PRODUCTS,
        "index < size ? index : size - 1",
        "index",
        BEYOND,
    ),
    Bug(
        "elements beyond the matrix are written",
        PRODUCTS,
        "i < size && j < size",
        "true",
        f"{BEYOND}|{OUTSIDE}|{RACE}",
    ),
    Bug("tiles too small for the matrix", PRODUCTS, "size <= 64", "true", WRONG),
    # Matrices of the groups.
    Bug(
        "half of the gradient",
        MATRIX,
        "if (p.add_transposed) sum += p.parts.at(group, column, row);",
        "",
        WRONG,
    ),
    Bug("no division by the samples", MATRIX, "sum / float(p.samples)", "sum", WRONG),
    Bug(
        "what is not finite passes",
        MATRIX,
        "finite = finite && fabsf(value) <= kLargest;  // which NaN is not",
        "",
        WRONG,
    ),
    Bug(
        "an infinity passes",
        MATRIX,
        "finite = finite && fabsf(value) <= kLargest;  // which NaN is not",
        "finite = finite && value == value;",
        WRONG,
    ),
    Bug(
        "NaN is known to its thread alone",
        MATRIX,
        "!block_any<kWhitenThreads>(!finite, shared.flags())",
        "finite",
        "some threads never reach block_barrier",
    ),
    Bug(
        "the root of a negative", MATRIX, "(value > 0 ? value : 0) + p.eps", "value + p.eps", WRONG
    ),
    Bug("no eps", MATRIX, "(value > 0 ? value : 0) + p.eps", "(value > 0 ? value : 0)", WRONG),
    Bug("no unit", MATRIX, "double(eigenvalues.unit)", "1.0", WRONG),
    Bug(
        "vectors in rows", MATRIX, "i % size * side + i / size", "i / size * side + i % size", WRONG
    ),
    Bug("no scale", MATRIX, "shared_load(scales + k) * element(k, i)", "element(k, i)", WRONG),
    Bug("the upper half is left out", MATRIX, "matrix[j * size + i] = value;", "", WRONG),
    # The gradient.
    Bug(
        "to the eigenbasis by its transpose",
        GRADIENT,
        "multiply_square(size, u, x, set);",
        "multiply_square(size, transposed_u, x, set);",
        WRONG,
    ),
    Bug(
        "the derivative at one eigenvalue",
        GRADIENT,
        "-both * (both / (scale[i] + scale[j]) * value)",
        "-both * (both / (2 * scale[i]) * value)",
        WRONG,
    ),
    Bug(
        "the cube of a scale",
        GRADIENT,
        "-both * (both / (scale[i] + scale[j]) * value)",
        "-both * (both / (scale[i] + scale[j])) * value",
        WRONG,
    ),
    # Launches.
    Bug(
        "groups lie one column apart",
        LAUNCH,
        "shape.size * values.column_stride",
        "shape.size",
        WRONG,
    ),
    Bug(
        "the first group's mean for all",
        LAUNCH,
        "operand.mean_batch_stride = shape.size;",
        "operand.mean_batch_stride = 0;",
        WRONG,
    ),
    Bug(
        "the first group's matrix for all",
        LAUNCH,
        "right.batch_stride = int64_t(shape.size) * shape.size;",
        "right.batch_stride = 0;",
        WRONG,
    ),
    Bug(
        "the mean in one float",
        LAUNCH,
        "centred_groups(shape, p.features, p.mean, w.mean_low)",
        "centred_groups(shape, p.features, p.mean, nullptr)",
        WRONG,
    ),
    Bug(
        "the gradient is not centred",
        LAUNCH,
        "centred_groups(shape, p.grad_whitened, w.mean_high, w.mean_low)",
        "centred_groups(shape, p.grad_whitened, nullptr, nullptr)",
        WRONG,
    ),
    Bug(
        "half of a moment that is not symmetric",
        LAUNCH,
        "shape.moment(false)",
        "shape.moment(true)",
        WRONG,
    ),
    Bug(
        "the second term is left out",
        LAUNCH,
        "apply.term_count = 2;",
        "apply.term_count = 1;",
        WRONG,
    ),
    Bug(
        "pieces of memory overlap",
        "workspace.cuh",
        "bytes_ += (count * int64_t(sizeof(T)) + 15) / 16 * 16;",
        "bytes_ += 16;",
        f"{OUTSIDE}|{WRONG}",
    ),
]


def build_program(folder: Path) -> Path:
    return build(copy_of_kernels(folder, BUGS), "planted_bugs_zca_whiten.cpp")
