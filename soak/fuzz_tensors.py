"""Files of torch.save that are wrong on purpose: archives, pickles, and what they hold."""

import copy
import io
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from random import Random
from typing import Any

import torch

from fuzz_values import NASTY_NAMES, damaged, mutated, odd_value
from medmoco.seal import seal


class Command:
    """A pickle that would run code where it is loaded; the name of the folder proves it."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def tensor_file(random: Random, content: dict[str, Any]) -> bytes:
    """`content` as torch.save writes it, with something wrong in nine of ten files."""
    kind = random.randrange(10)
    if kind == 0:
        return packed(content)
    if kind == 1:
        return _hostile(random, content)
    if kind < 6:
        return _saved(random, mutated(random, content, _odd_entry))
    file = packed(content)
    if kind == 6:
        return damaged(random, file)
    return _rebuilt(random, file)


def state_file(random: Random, content: dict[str, Any]) -> bytes:
    """A checkpoint that is whole, with something wrong in the state of nine of ten."""
    kind = random.randrange(10)
    if kind == 0:
        return packed(content)
    content = copy.deepcopy(content)
    holder, key = content, "state"
    if "course" in content["state"] and random.random() < 0.8:
        holder, key = content["state"], "course"
    if kind < 6:
        holder[key] = mutated(random, holder[key], _odd_entry)
        return _saved(random, content, old=0.0)
    for _ in range(random.choice((1, 1, 3))):
        place, name = random.choice(list(_places_of_tensors(holder[key])))
        place[name] = _odd_twin(random, place[name])
    return packed(content)


def packed(content: Any, legacy: bool = False) -> bytes:
    """The bytes of torch.save, with our checksum where the format has a place for it."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    archive = bytearray(buffer.getvalue())
    if not legacy:
        seal(archive)
    return bytes(archive)


def _saved(random: Random, content: Any, old: float = 0.2) -> bytes:
    try:
        return packed(content, legacy=random.random() < old)
    except (RecursionError, UnicodeEncodeError, ValueError, RuntimeError):
        return packed({"format": NASTY_NAMES[0]})  # torch itself writes no such thing


@lru_cache(maxsize=1)
def _odd_tensors() -> tuple[Any, ...]:
    return (
        torch.zeros(()),
        torch.zeros(3),
        torch.tensor([float("nan"), float("inf")]),
        torch.zeros(1).expand(10**6, 10**6),  # 4 bytes in the file
        torch.zeros(1, dtype=torch.uint8).expand(2**40),
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.zeros(0, 7),
        torch.ones(2, 2).to_sparse(),
        torch.empty(10**6, 10**6, device="meta"),
        torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        torch.nn.Parameter(torch.ones(2)),
        torch.zeros(4, dtype=torch.bool),
        torch.full((2,), 2**62),
        torch.Size([1, 2]),
        torch.float16,
        {1, 2},
        b"bytes",
        (1, (2, 3)),
        {1: 2, None: 3, (1, 2): "tuple"},
    )


def _odd_entry(random: Random) -> Any:
    kind = random.randrange(4)
    if kind == 0:
        return odd_value(random)
    if kind == 1:
        return _circle() if random.random() < 0.5 else _doubled()
    return random.choice(_odd_tensors())


def _places_of_tensors(value: Any) -> Iterator[tuple[Any, Any]]:
    """The dictionaries and lists that hold a tensor, each with its key."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, torch.Tensor):
            yield value, key
        elif isinstance(item, (dict, list)):
            yield from _places_of_tensors(item)


def _odd_twin(random: Random, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with odd values, or with its values in another shape or type."""
    kind = random.randrange(8)
    if tensor.numel() == 0:
        return tensor
    if kind == 0:
        return tensor.to(random.choice((torch.bfloat16, torch.float64, torch.int64, torch.uint8)))
    if kind == 1:
        return random.choice((tensor[None], tensor.flatten()[:-1], tensor.flatten()[:, None]))
    if kind == 2:
        return tensor.flatten()[:1].expand(tensor.numel()).view(tensor.shape)
    if kind == 3 or tensor.is_complex():
        return tensor.to(torch.complex64)
    if kind == 4 and tensor.is_floating_point():
        return torch.nn.Parameter(tensor)
    odd = tensor.clone().flatten()
    for _ in range(random.choice((1, 3, min(len(odd), 300)))):
        numbers: tuple[Any, ...] = (0, 1, 2, 625, 2**40, math.nan, math.inf, -1, -(2.0**99), 3e38)
        if not odd.is_floating_point():
            small, large = (0, 1, 2, 255), (0, 1, -1, 625, 2**62, -(2**63))
            numbers = small if odd.dtype == torch.uint8 else large
        odd[random.randrange(len(odd))] = random.choice(numbers)
    return odd.view(tensor.shape)


def _circle() -> list[Any]:
    """A list that holds itself."""
    ring: list[Any] = [1]
    ring.append(ring)
    return ring


def _doubled(levels: int = 60) -> list[Any]:
    """A few bytes in the file, 2^60 numbers to whoever walks through it or prints it."""
    value: list[Any] = [0]
    for _ in range(levels):
        value = [value, value]
    return value


def _hostile(random: Random, content: dict[str, Any]) -> bytes:
    """Would run a command, make a folder, open a file or import a module where it is unpickled."""
    command = random.choice(
        (
            Command(os.system, "true"),
            Command(os.mkdir, "made-by-a-pickle"),
            Command(open, "written-by-a-pickle", "w"),
            Command(eval, "__import__('os').mkdir('made-by-eval')"),
            Command(exec, "open('written-by-exec', 'w')"),
            Command(__import__, "antigravity"),
        )
    )
    target: Any = {**content, random.choice((*content, "extra")): command}
    kind = random.randrange(4)
    if kind == 0:
        return pickle.dumps(random.choice((command, target)), protocol=random.choice((0, 2, 4)))
    return packed(target if kind < 3 else command, legacy=kind == 1)


def _rebuilt(random: Random, file: bytes) -> bytes:
    """The same archive with right checksums, and entries that are missing, changed or too many."""
    source = zipfile.ZipFile(io.BytesIO(file))
    entries = [(info.filename, source.read(info)) for info in source.infolist()]
    method = zipfile.ZIP_STORED
    kind = random.randrange(8)
    chosen = random.randrange(len(entries))
    name, held = entries[chosen]
    if kind == 0:
        del entries[chosen]
    elif kind == 1:
        evil = random.choice(("../../outside", "/tmp/outside", "archive/data/" + "9" * 500))
        entries[chosen] = (evil, held)
    elif kind == 2:
        method = zipfile.ZIP_DEFLATED
        entries.append(("archive/data/0", bytes(32 << 20)))
    elif kind == 3:
        entries[chosen] = (name, damaged(random, held))
    elif kind == 4:
        entries += entries[:1] * random.choice((1, 300))
    elif kind == 5:
        prefix = name.split("/")[0]
        entries = [(n.replace(prefix, "..", 1), content) for n, content in entries]
    else:  # the pickle: names, lengths and numbers in it
        index = next(i for i, (n, _) in enumerate(entries) if n.endswith("data.pkl"))
        entries[index] = (entries[index][0], _pickle_changed(random, entries[index][1]))
    rebuilt = io.BytesIO()
    with zipfile.ZipFile(rebuilt, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that stand twice
        for entry, content in entries:
            archive.writestr(zipfile.ZipInfo(entry), content, method)
    return rebuilt.getvalue()


def _pickle_changed(random: Random, content: bytes) -> bytes:
    if random.random() < 0.5:
        return damaged(random, content)
    odd = random.choice((0, 1, 2**31 - 1, 2**30, 3)).to_bytes(4, "little")
    places = [i for i in range(len(content) - 5) if content[i : i + 1] in (b"K", b"M", b"J")]
    place = random.choice(places or [0])
    length = {b"K": 1, b"M": 2}.get(content[place : place + 1], 4)
    return content[:place] + b"J" + odd + content[place + 1 + length :]
