"""The test cases that the page shows: what a run keeps of them, and its label maps of them."""

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmoco.data.store import FULL_SCALE, SliceCache
from medmoco.data.volumes import read_volume, to_stack
from medmoco.errors import UserError
from medmoco.output import write_bytes_atomic
from medmoco.report.comparison import volume_mean

CASES_NAME = "predictions/cases.npz"
# Whose worst and best cases are shown: the first of these that a run has, names as in summary.json.
LEADING = ("finetune", "finetune_scratch", "linear", "linear_random")
EACH = 3  # worst cases, and as many best ones
# The most that is kept of a volume; larger ones are thinned by whole steps.
MAX_SHAPE = (64, 256, 256)
TABLES = {"axis": (), "values": (None,), "step": (None, 3), "shape": (None, 3)}
TABLES |= {"spacing": (None, 3), "case": (None,)}


@dataclass(frozen=True, eq=False)
class ShownCase:
    """Some slices of a test volume, and how they were taken from its stack.

    Attributes:
        case: its name.
        image, truth: (n, h, w) uint8, grey values and class indices.
        shape, spacing: of the whole stack (slices, rows, columns); mm.
        step: slices, rows and columns of the stack that are one here; see `thinned`.
        axis: canonical axis that the stack is cut along.
        values: of the classes in label maps, the background first.
    """

    case: str
    image: np.ndarray
    truth: np.ndarray
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    step: tuple[int, int, int]
    axis: int
    values: tuple[int, ...]

    @property
    def positions(self) -> list[int]:
        """The shown slices' places in the whole stack."""
        return list(range(self.step[0] // 2, self.shape[0], self.step[0]))


def choose_cases(dice_per_volume: dict[str, dict[str, float | None]]) -> list[str]:
    """The worst cases and the best ones by mean Dice, worst first; all where they are few."""
    means = {case: volume_mean(scores) for case, scores in dice_per_volume.items()}
    known = {case: mean for case, mean in means.items() if mean is not None}
    order = sorted(known, key=lambda case: (known[case], case))
    return order if len(order) <= 2 * EACH else order[:EACH] + order[-EACH:]


def thinned(stack: np.ndarray, step: Sequence[int]) -> np.ndarray:
    """Labels (N, H, W) with the voxel in the middle of every block of `step` voxels.

    Blocks of rows and columns that are not whole are left out.
    """
    _, height, width = stack.shape
    slices, rows, columns = step
    whole = stack[slices // 2 :: slices, : height // rows * rows, : width // columns * columns]
    return np.ascontiguousarray(whole[:, rows // 2 :: rows, columns // 2 :: columns])


def averaged(stack: np.ndarray, step: Sequence[int]) -> np.ndarray:
    """16-bit pixels (N, H, W) as 8-bit ones: the same slices and blocks, their mean in plane."""
    slices, rows, columns = step
    chosen = stack[slices // 2 :: slices]
    count, height, width = len(chosen), stack.shape[1] // rows, stack.shape[2] // columns
    blocks = chosen[:, : height * rows, : width * columns]
    means = blocks.reshape(count, height, rows, width, columns).mean(axis=(2, 4), dtype=np.float32)
    return np.rint(means * (255 / FULL_SCALE)).astype(np.uint8)


def write_cases(folder: Path, cache: SliceCache, results: dict[str, Any]) -> None:
    """Keeps slices and truth of the worst and best cases of a run, for the report.

    Args:
        folder: of the run.
        cache: slices with labels.
        results: of the run, as they go into summary.json.
    """
    found = {**results, **results["controls"]}
    leading = next((found[name] for name in LEADING if found.get(name)), None)
    numbers = {case: number for number, case in enumerate(cache.volumes.names("case"))}
    chosen = choose_cases(leading["dice_per_volume"]) if leading else []
    if not chosen:
        return
    volumes = [cache.volumes[numbers[case]] for case in chosen]
    steps = [
        [math.ceil(size / most) for size, most in zip(volume.shape, MAX_SHAPE, strict=True)]
        for volume in volumes
    ]
    arrays = {
        "axis": np.array(cache.axis),
        "values": np.array(cache.values),
        "case": np.array(chosen),
        "shape": np.array([volume.shape for volume in volumes]),
        "spacing": np.array([volume.spacing for volume in volumes]),
        "step": np.array(steps),
    }
    for i, (case, step) in enumerate(zip(chosen, steps, strict=True)):
        arrays[f"image_{i}"] = averaged(cache.images(numbers[case]), step)
        arrays[f"truth_{i}"] = thinned(cache.labels(numbers[case]), step)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes_atomic(folder / CASES_NAME, buffer.getvalue())


def read_cases(folder: Path) -> list[ShownCase]:
    """What `write_cases` has kept, worst case first; empty for a run without it.

    Raises:
        UserError: the file is broken, an array is missing, or it is not as expected. Pickles in it
            are refused.
    """
    path = folder / CASES_NAME
    if not path.is_file():
        return []
    try:
        # Opened here, as numpy leaves a file open that turns out to be no archive.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            tables = {name: file[name] for name in TABLES}
            count = len(np.atleast_1d(tables["case"]))
            pairs = [(file[f"image_{i}"], file[f"truth_{i}"]) for i in range(count)]
    except KeyError as error:
        raise UserError(f"{path}: expected the array {error}, which is missing") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, TypeError) as error:
        raise UserError(f"{path}: expected arrays written by numpy.savez: {error}") from error
    _check(path, tables)
    return [_case(path, i, tables, *pairs[i]) for i in range(count)]


def read_prediction(path: Path, case: ShownCase, own: bool = True) -> np.ndarray | None:
    """The shown slices of a label map, class indices like `case.truth`; None without the file.

    Args:
        own: of the run that kept the case; another run's may be of the same scan on another grid,
            and is None then, too.

    Raises:
        UserError: the file is broken, has another grid than the case, or values of no class.
    """
    if not path.is_file():
        return None
    stack = to_stack(read_volume(path, label=True).voxels, case.axis)
    if stack.shape != case.shape:
        if not own:
            return None
        raise UserError(f"{path}: expected a stack of {case.shape} voxels, got {stack.shape}")
    labels = thinned(stack, case.step)
    values = np.array(case.values)
    order = np.argsort(values)
    index = np.searchsorted(values[order], labels).clip(max=len(values) - 1)
    if (values[order][index] != labels).any():
        unknown = np.setdiff1d(labels, values)[:10].tolist()
        raise UserError(f"{path}: expected label values {list(case.values)}, got also {unknown}")
    return order[index].astype(np.uint8)


def _check(path: Path, tables: dict[str, np.ndarray]) -> None:
    kinds = {"case": "U", "spacing": "f"}
    cases = len(np.atleast_1d(tables["case"]))
    for name, expected in TABLES.items():
        array = tables[name]
        lengths = tuple(cases if length is None else length for length in expected)
        if name == "values":
            lengths = (array.size,)
        if array.shape != lengths:
            raise UserError(f"{path}: {name} must have shape {lengths}, got {array.shape}")
        if array.dtype.kind not in kinds.get(name, "iu"):
            raise UserError(f"{path}: {name} has an unexpected type, {array.dtype}")
    limits = {"axis": 0, "values": 0, "shape": 1, "step": 1, "spacing": np.finfo(float).tiny}
    for name, least in limits.items():
        if not (tables[name] >= least).all():
            raise UserError(f"{path}: {name} must be at least {least:g}, got {tables[name].min()}")
    if tables["axis"] > 2 or not tables["values"].size:
        raise UserError(f"{path}: expected an axis of 0 to 2 and values of classes")


def _case(
    path: Path, i: int, tables: dict[str, np.ndarray], image: np.ndarray, truth: np.ndarray
) -> ShownCase:
    name = str(tables["case"][i])
    shape, spacing, step = (tuple(tables[key][i].tolist()) for key in ("shape", "spacing", "step"))
    expected = (math.ceil((shape[0] - step[0] // 2) / step[0]),)
    expected += tuple(size // wide for size, wide in zip(shape[1:], step[1:], strict=True))
    for kind, array in (("image", image), ("truth", truth)):
        if array.shape != expected or not all(array.shape):
            raise UserError(f"{path}: {kind}_{i} must have shape {expected}, got {array.shape}")
        if array.dtype != np.uint8:
            raise UserError(f"{path}: {kind}_{i} has an unexpected type, {array.dtype}")
    if truth.max() >= tables["values"].size:
        raise UserError(f"{path}: truth_{i} must hold class indices, got {truth.max()}")
    if name != Path(name).name:
        raise UserError(f"{path}: expected names of cases, got {name!r}")
    values = tuple(tables["values"].tolist())
    return ShownCase(name, image, truth, shape, spacing, step, int(tables["axis"]), values)
