"""Values that readers do not expect, and mutations of bytes and of nested values."""

import json
from random import Random
from typing import Any

NASTY_NAMES = (
    'a<script>alert("1")</script>&',
    "line\nbreak\r\x00\x1b[2J",
    "\udcff\udc80\u202e",
    "../../../outside",
    "/etc/passwd",
    "=cmd|' /C calc'!A1",
    "$\\frac{1}{",
    "__import__('os').system('true')",
    "n" * 100_000,
    "",
    ".",
    "..",
    "con\\..\\nul:",
)
NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 65535, 2**31 - 1, -(2**31), 2**32, 2**63 - 1, -(2**63), 2**64),
    *(10**30, 10**299, 0.0, -0.0, 0.5, 1.5, -2.5, 1e-320, 1e38, 1e300, -1e308),
    *(float("nan"), float("inf"), float("-inf")),
)


def odd_value(random: Random) -> Any:
    """Anything that JSON can hold, and some that it cannot."""
    kind = random.randrange(8)
    if kind < 3:
        return random.choice(NUMBERS)
    if kind < 5:
        return random.choice(NASTY_NAMES)
    return random.choice(
        (
            *(None, True, False, [], {}, [[]], {"": {}}, [1, "a", None], {"0": 0, "1": "x"}),
            *(["a", "a"], [random.choice(NASTY_NAMES)] * 3, {random.choice(NASTY_NAMES): 1}),
            *(_deep(random.choice((10, 100, 900))), [0] * 20_000),
        )
    )


def mutated(random: Random, value: Any, odd: Any = odd_value) -> Any:
    """A copy with one to three places of the nested lists and dictionaries changed."""
    holder = [_copied(value)]
    for _ in range(random.choice((1, 1, 2, 3))):
        place: Any = holder
        key: Any = 0
        # Down to a random depth, but for one time in ten not at the very top.
        while isinstance(place[key], (list, dict)) and place[key]:
            if place is not holder and random.random() < 0.3:
                break
            place = place[key]
            key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
        change = random.randrange(6)
        if change == 0 and place is not holder:
            del place[key]
            if not place:
                continue
        elif change == 1 and isinstance(place, dict):
            place[random.choice(NASTY_NAMES)] = place.pop(key)
        elif change == 2 and isinstance(place, list) and place is not holder:
            place.append(place[key])
        else:
            place[key] = odd(random)
    return holder[0]


def json_bytes(random: Random, value: Any) -> bytes:
    """A mutated document; now and then the text, or its bytes, are damaged on top."""
    changed = mutated(random, value) if random.random() < 0.9 else value
    text = json.dumps(changed, ensure_ascii=random.random() < 0.7)
    kind = random.randrange(12)
    if kind == 0:
        text = text.replace("1", "9" * random.choice((400, 5000, 100_000)), 1)
    elif kind == 1:
        text = text.replace("{", '{"twice": 1, "twice": 2, ', 1)
    elif kind == 2:
        text = random.choice(("[", '{"a":', '["', "[[],")) * random.choice((70, 5000, 200_000))
    elif kind == 3 and random.random() < 0.1:  # large
        part = random.choice(("[],", '"ab",', '"\\\\n",', "{},", "1,", "1e1,", f'"{"x" * 999}",'))
        # More than is read, or what takes a second or two: readers may read it twice.
        text = "[" + part * (random.choice((6 << 20, 17 << 20)) // len(part)) + text + "]"
    elif kind == 3:
        text = text.replace("1", random.choice(("1e999", "NaN", "-Infinity", "1e-400", "0x1")), 1)
    content = text.encode("utf-8", "surrogatepass")
    if kind == 4:
        content = text.encode(random.choice(("utf-16", "utf-32", "utf-8-sig")), "surrogatepass")
    return damaged(random, content) if kind < 8 and random.random() < 0.6 else content


def damaged(random: Random, content: bytes) -> bytes:
    """Bytes flipped, cut off, repeated, or with something behind them."""
    changed = bytearray(content)
    kind = random.randrange(6)
    if kind == 0:
        return bytes(changed[: random.randrange(len(changed) + 1)])
    if kind == 1:
        return bytes(changed) + random.randbytes(random.choice((1, 100, 5000)))
    if kind == 2 and changed:
        start = random.randrange(len(changed))
        return bytes(changed[:start] + changed[start : start + 200] * 3 + changed[start:])
    if kind == 3:
        return random.choice((b"", b"\0", b"\0" * 5000, random.randbytes(400), b"PK\x03\x04", b"<"))
    for _ in range(random.choice((1, 1, 4, 50))):
        if changed:
            changed[random.randrange(len(changed))] = random.choice((0, 1, 127, 128, 255, 92, 34))
    return bytes(changed)


def _copied(value: Any) -> Any:
    """Lists and dictionaries anew, what they hold as it is."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value
