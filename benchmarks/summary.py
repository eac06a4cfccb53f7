"""The last lines of a benchmark: medmoco in each case, beside the peers that count."""

from collections.abc import Sequence

from reporting import OURS, Row, number

# Their names up to a comma: of attention with several splits of the queue the fastest counts.
FAMILIES = ("eager", "attention", "attention (flash)", "attention (cudnn)", "attention (efficient)")
HEADER = ("", f"{OURS} ms", "x floor", "MiB", "eager MiB")


def summary_text(rows: Sequence[Row]) -> str:
    """A line a case: medmoco's time and memory, and the times of its peers over it."""
    cases: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.part == "cases":
            case = (row.op, row.shape, row.dtype, row.pass_name)
            cases.setdefault(case, []).append(row)
    families = [f for f in FAMILIES if any(family(row) == f for row in rows)]
    lines = [[*HEADER, *(f"x {f}" for f in families)]]
    for case, contestants in cases.items():
        peers = {f: [row for row in contestants if family(row) == f] for f in families}
        ours = contestants[0]
        lines.append(
            [
                " ".join(case),
                ours.status if ours.status != "ok" else number(ours.median_ms),
                number(ours.times_floor, ".2f"),
                number(ours.peak_mib, ".1f"),
                number(next((row.peak_mib for row in peers.get("eager", ())), None), ".1f"),
                *(times_medmoco(peers[f]) for f in families),
            ]
        )
    notes = dict.fromkeys(row.note for row in rows if row.contestant == OURS and row.note)
    return "\n".join([aligned(lines), *(f"{OURS}: {note}" for note in notes)])


def family(row: Row) -> str:
    return row.contestant.partition(",")[0]


def times_medmoco(peers: Sequence[Row]) -> str:
    """How many times medmoco's time the fastest takes, and in how many splits."""
    timed = [row for row in peers if row.times_medmoco is not None]
    if timed:
        best = min(timed, key=lambda row: row.times_medmoco or 0)
        variant = best.contestant.partition(", ")[2]
        return number(best.times_medmoco, ".2f") + (f" ({variant})" if variant else "")
    if any(row.note.endswith("out of memory") for row in peers):
        return "out of memory"
    return "n/a"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, the first to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]) for line in lines
    )
