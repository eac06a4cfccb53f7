"""What the viewer shows: cases and label maps of the runs, packed for its script."""

import base64
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from PIL import Image

from medmoco.printing import visible
from medmoco.report.cases import LEADING, ShownCase, read_cases, read_prediction
from medmoco.report.run_folder import MODEL_FOLDERS, Result, Run

MAX_BYTES = 7_500_000  # of the slices and masks on one page
QUALITY = 80  # of the pictures, which are there to be looked at; the masks are exact


@dataclass(frozen=True, eq=False)
class Model:
    """One model of one run; `name` as in Run.results."""

    run: Run
    name: str

    @property
    def result(self) -> Result:
        return self.run.results[self.name]


@dataclass(frozen=True, eq=False)
class Entry:
    """A case of the page.

    Attributes:
        run: that chose it.
        place: among the cases that the run keeps, worst first.
        kept: how many these are.
        shown: its slices.
        masks: class indices like shown.truth by model, without the models that have none of it.
        packed: all of it for the script, but for the masks.
    """

    run: Run
    place: int
    kept: int
    shown: ShownCase
    masks: dict[Model, np.ndarray]
    packed: dict[str, Any]

    @property
    def worst(self) -> bool:
        return 2 * self.place < self.kept


def leading_model(run: Run) -> str | None:
    """The model whose worst and best cases are shown, as in Run.results."""
    leading = next((r for name in LEADING if (r := getattr(run, name)) is not None), None)
    return next((name for name, result in run.results.items() if result is leading), None)


def gather(runs: Sequence[Run]) -> tuple[list[Entry], list[str]]:
    """Cases run by run, the worst first, then the best; and names of those that had no room.

    Raises:
        UserError: what a run has kept, or a label map, is broken.
    """
    models = [Model(run, name) for run in runs for name in run.results]
    kept = {run.folder: read_cases(run.folder) for run in runs}
    entries: list[Entry] = []
    left_out: list[str] = []
    seen = set()
    room = MAX_BYTES
    for run, place in _by_turns(runs, kept):
        shown = kept[run.folder][place]
        identity = shown.case, shown.image.tobytes(), shown.truth.tobytes()
        if identity in seen:  # another run has chosen it too
            continue
        seen.add(identity)
        masks = {m: mask for m in models if (mask := _mask(m, run, shown, kept)) is not None}
        packed = pack(shown, run.classes, masks.values())
        size = len(json.dumps(packed))
        if size > room:
            left_out.append(shown.case)
            continue
        room -= size
        entries.append(Entry(run, place, len(kept[run.folder]), shown, masks, packed))
    order = list(runs)
    entries.sort(key=lambda e: (order.index(e.run), not e.worst, e.place if e.worst else -e.place))
    return entries, left_out


def _by_turns(runs: Sequence[Run], kept: dict[Any, list[ShownCase]]) -> Iterator[tuple[Run, int]]:
    """The worst of each run, the best of each, the next worst: each has some where room ends."""
    turns = []
    for run in runs:
        count = len(kept[run.folder])
        inwards = chain.from_iterable((i, count - 1 - i) for i in range((count + 1) // 2))
        turns.append([(run, place) for place in dict.fromkeys(inwards)])
    for together in zip_longest(*turns):
        yield from (turn for turn in together if turn is not None)


def _mask(
    model: Model, run: Run, shown: ShownCase, kept: dict[Any, list[ShownCase]]
) -> np.ndarray | None:
    """The model's label map of a case that `run` has chosen, if it is of the same kind."""
    if model.run is not run:
        own = kept[model.run.folder]
        kinds = {(tuple(case.values), case.axis) for case in own}
        if kinds != {(shown.values, shown.axis)} or model.run.classes != run.classes:
            return None
        if shown.case not in model.result.per_volume:
            return None
    folder = model.run.folder / "predictions" / MODEL_FOLDERS[model.name]
    return read_prediction(folder / f"{shown.case}.nii.gz", shown, own=model.run is run)


def pack(shown: ShownCase, classes: Sequence[str], masks: Any) -> dict[str, Any]:
    """A case as JSON values: pictures as WebP, masks compressed, the truth's first."""
    _, height, width = shown.truth.shape
    rows, columns = (
        size * step for size, step in zip((height, width), shown.step[1:], strict=True)
    )
    count = len(shown.values)
    return {
        "name": visible(shown.case),
        "classes": [visible(c) for c in class_names(classes, count)],
        "width": width,
        "height": height,
        "aspect": f"{columns * shown.spacing[2]:.6g} / {rows * shown.spacing[1]:.6g}",
        "slices": shown.shape[0],
        "positions": shown.positions,
        "start": int((shown.truth > 0).sum(axis=(1, 2)).argmax()),
        "images": [_base64(_webp(image)) for image in shown.image],
        "maps": [_base64(zlib.compress(mask.tobytes(), 9)) for mask in (shown.truth, *masks)],
    }


def class_names(names: Sequence[str], count: int) -> list[str]:
    return [names[i] if i < len(names) else f"class {i}" for i in range(count)]


def _webp(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=QUALITY)
    return buffer.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
