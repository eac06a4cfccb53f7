"""Weights of an encoder from files of ours and of others.

Read are encoder.pt, state_dicts of torchvision's ResNets, and checkpoints of trainers that wrap
one: MoCo v1 and v2 ("module.encoder_q.conv1.weight"), SwAV, DINO and the like. The keys of the
network are found by their ends, so no list of prefixes is needed.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from medmoco.errors import UserError
from medmoco.models.encoder import ARCHITECTURES, FORMAT, Encoder, load_encoder, require_finite
from medmoco.tensor_file import load_tensors

Config = TypeVar("Config", bound=Any)  # a configuration with arch and width

STEM = "conv1.weight"
IN_EVERY_RESNET = (STEM, "layer1.0.conv1.weight")
BACKBONE = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
NESTED = 4  # dictionaries within dictionaries that are looked into
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Weights:
    """The entries of an encoder that a file holds.

    Attributes:
        path: the file.
        arch: of the encoder.
        width: of the encoder.
        state: entries of the state_dict of an encoder of one channel; some may be missing.
        metadata: what encoder.pt tells besides; of other files {"calibrated": False}: the
            statistics of their normalisations are those of other images than ours.
        about: what matched and what did not, for people.
    """

    path: Path
    arch: str
    width: float
    state: dict[str, Tensor]
    metadata: dict[str, Any]
    about: str

    def load_into(self, encoder: Encoder) -> None:
        """Entries that are missing stay as they are.

        Args:
            encoder: of this arch and width, for one channel.
        """
        encoder.load_state_dict(self.state, strict=False)


def read_weights(path: Path) -> Weights:
    """Reads a file of weights. No code in it is run, and no random number is drawn.

    A stem for several channels is summed over them: for a grey image in each of the channels the
    sum gives the same.

    Raises:
        UserError: no such file, no ResNet in it, or one that is none of ours.
    """
    path = Path(path)
    content = load_tensors(path)
    if content.get("format") == FORMAT:
        encoder, metadata = load_encoder(path)
        state, channels = _with_one_channel(encoder.state_dict())
        about = f"{path}: {_kind(encoder.arch, encoder.width)}, all {len(state)} entries"
        return Weights(
            path, encoder.arch, encoder.width, state, metadata, about + _summed(channels)
        )
    prefix, found = _find_resnet(path, content)
    expected, arch, width = _choose_architecture(path, found)
    state = {name: found[name].to(like.dtype) for name, like in expected.items() if name in found}
    require_finite(path, state, prefix)
    state, channels = _with_one_channel(state)
    # Files from before PyTorch 0.4.1 have no counters, and nothing is lost with them.
    missing = [n for n in expected if n not in state and not n.endswith("num_batches_tracked")]
    unused = [name for name in found if name not in expected]
    about = (
        f"{path}: {_kind(arch, width)}, {len(state)} of {len(expected)} entries matched"
        + (f" (prefix {prefix!r})" if prefix else "")
        + _summed(channels)
        + (f"; missing {_some(missing)}" if missing else "")
        + (f"; left out {_some(unused)}" if unused else "")
    )
    return Weights(path, arch, width, state, {"calibrated": False}, about)


def with_architecture(config: Config, weights: Weights) -> Config:
    """The configuration with --arch and --width of the file.

    Raises:
        UserError: it has others.
    """
    for name in ("arch", "width"):
        asked, found = getattr(config, name), getattr(weights, name)
        if asked not in (None, found):
            raise UserError(f"{weights.path}: --{name} {asked} was given, the file has {found}")
    return replace(config, arch=weights.arch, width=weights.width)


def _find_resnet(path: Path, content: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """The prefix of the first ResNet in a file, and its entries without the prefix.

    Where there are two, trainers write the one that learns before the one that follows it.
    """
    named = dict(_tensors(content))
    for name in named:
        prefix = name.removesuffix(STEM)
        # With the end cut off, "backbone.layer1.0." is no prefix of a whole network.
        if prefix != name and all(prefix + end in named for end in IN_EVERY_RESNET):
            size = len(prefix)
            return prefix, {n[size:]: t for n, t in named.items() if n.startswith(prefix)}
    raise UserError(
        f"{path}: expected an encoder.pt of medmoco or a ResNet in torchvision's keys such as "
        f"{IN_EVERY_RESNET[1]}, got {_some(list(named)) if named else 'no tensor'}; nothing matches"
    )


def _tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of nested dictionaries, the names joined by dots; each dictionary once."""
    seen: set[int] = set()
    yield from _tensors_within(content, "", 0, seen)


def _tensors_within(
    content: Any, prefix: str, depth: int, seen: set[int]
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, dict) and depth < NESTED and id(content) not in seen:
        seen.add(id(content))
        for name, value in content.items():
            if isinstance(name, str):
                yield from _tensors_within(value, f"{prefix}{name}.", depth + 1, seen)


def _choose_architecture(
    path: Path, found: dict[str, Tensor]
) -> tuple[dict[str, Tensor], str, float]:
    """The architecture that differs from the file in fewest entries: its state_dict, on the meta
    device, its name and its width."""
    width = found[STEM].shape[0] / 64 if found[STEM].ndim == 4 else 0.0
    candidates = []
    for arch in ARCHITECTURES:
        with torch.device("meta"):
            expected = _expected(path, arch, width, found[STEM])
        missing = len(expected.keys() - found.keys())
        misfits = [n for n in found if n.startswith(BACKBONE) and not _fits(n, found, expected)]
        candidates.append((missing + 2 * len(misfits), arch, expected, misfits))
    _, arch, expected, misfits = min(candidates, key=lambda candidate: candidate[0])
    if misfits:
        name = misfits[0]
        here = tuple(found[name].shape)
        there = f"{tuple(expected[name].shape)}" if name in expected else "none of this name"
        raise UserError(
            f"{path}: expected the weights of {', '.join(ARCHITECTURES)}; nearest is "
            f"{_kind(arch, width)}, which {len(misfits)} entries contradict: {name} is {here}, "
            f"expected {there}"
        )
    return expected, arch, width


def _expected(path: Path, arch: str, width: float, stem: Tensor) -> dict[str, Tensor]:
    try:
        return Encoder(arch, width, in_channels=stem.shape[1]).state_dict()
    except Exception as error:  # the shape can be anything
        raise UserError(
            f"{path}: {STEM} must be (channels, channels of the image, 7, 7), "
            f"got {tuple(stem.shape)}"
        ) from error


def _fits(name: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    like, value = expected.get(name), found[name]
    return (
        like is not None
        and like.shape == value.shape
        and like.is_floating_point() == value.is_floating_point()
    )


def _with_one_channel(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The state with a stem for one channel, and the channels that it was for."""
    stem = state[STEM]
    return {**state, STEM: stem.sum(dim=1, keepdim=True)}, stem.shape[1]


def _summed(channels: int) -> str:
    return f"; stem: {channels} channels summed into 1" if channels != 1 else ""


def _kind(arch: str, width: float) -> str:
    return arch if width == 1 else f"{arch} of width {width:g}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(itertools.islice(names, SHOWN))
    return f"{len(names)}: {shown}" + (", ..." if len(names) > SHOWN else "")
