"""What the page records of how the runs were made: files, time, configuration, commands."""

import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from medmoco.output import CONFIG_NAME
from medmoco.report.html import (
    DASH,
    NOTHING,
    Markup,
    command_line,
    details,
    element,
    section,
    table,
)
from medmoco.report.run_folder import Record, Run, finite, part_of


def files_section(runs: Sequence[Run]) -> Markup:
    several = len(runs) > 1
    rows = [
        [path, reason, *([run.name] if several else [])]
        for run in runs
        for path, reason in run.bad_files
    ]
    if not rows:
        return NOTHING
    columns = ["File", "Reason", *(["Run"] if several else [])]
    caption = "Files that could not be used and were left out"
    return section("files", "Skipped files", table(caption, columns, rows, kind="words"))


def timing_section(runs: Sequence[Run]) -> Markup:
    """Seconds of each stage, throughput, and the share of time spent waiting for data."""
    rows: dict[str, list[str]] = {}
    for column, run in enumerate(runs):
        seconds = part_of(run.summary or {}, "seconds")
        entries = {str(name): duration(value) for name, value in seconds.items()}
        entries |= {f"model: {n}": duration(r.seconds) for n, r in run.results.items() if r.seconds}
        speed = _recorded(run.pretrain, "images_per_second")
        if speed:
            entries["images per second in pretraining, median"] = f"{statistics.median(speed):.0f}"
        waits = _recorded(run.pretrain, "data_wait")
        if waits:
            share = f"{100 * statistics.median(waits):.0f} %"
            entries["waiting for data in pretraining, median"] = share
        for name, entry in entries.items():
            rows.setdefault(name, [DASH] * len(runs))[column] = entry
    if not rows:
        return NOTHING
    listed = [[name, *cells] for name, cells in rows.items()]
    whole = table("Time by stage, and throughput", ["Stage", *_heads(runs)], listed)
    return section("timing", "Timing", whole)


def configuration_section(runs: Sequence[Run]) -> Markup:
    """Every entry of config.json, and first what differs between the runs."""
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    cells = {name: [_plain(run.config, name) for run in runs] for name in names}
    columns = ["Flag", *_heads(runs)]
    parts = []
    if len(runs) > 1:
        differing = [[name, *cells[name]] for name in names if len(set(cells[name])) > 1]
        parts.append(table("What differs between the runs", columns, differing, kind="words"))
    whole = table("config.json", columns, [[n, *cells[n]] for n in names], kind="words")
    parts.append(details(f"All {len(names)} entries of config.json", whole))
    return section("configuration", "Configuration", *parts)


def commands_section(runs: Sequence[Run]) -> Markup:
    parts: list[Markup] = []
    for run in runs:
        if len(runs) > 1:
            parts.append(element("h3", run.name))
        typed = typed_command(run)
        if typed is not None:
            parts += [element("p", "As it was run:"), command_line(typed)]
        repeat = reproduce_command(run)
        if repeat is None:
            parts.append(element("p", "config.json does not say which command was run."))
        else:
            parts += [element("p", "Again, into a new folder:"), command_line(repeat)]
        parts += [element("p", "Next:"), command_line(next_command(run))]
    return section("commands", "Commands", *parts)


def typed_command(run: Run) -> str | None:
    """The command line that the run was started with; None if it is not recorded."""
    module, words = _module(run), run.config.get("argv")
    if module is None or not isinstance(words, list):
        return None
    # Started as `medmoco train`, the first word is the command itself.
    flags = words[1:] if words[:1] == [run.config["command"]] else words
    return _shell(["python", "-m", module, *flags])


def reproduce_command(run: Run) -> str | None:
    """The command that repeats the run into a folder beside it; None if it is not recorded."""
    if _module(run) is None:
        return None
    return _shell([*_with_config(run), "--output", _beside(run, "again")])


def next_command(run: Run) -> str:
    """What to try after this run: finish it, evaluate it, take real data, or another seed."""
    module, seed = _module(run), run.config.get("seed")
    if module is not None and run.summary is None:
        return _shell([*_with_config(run), "--output", run.folder, "--resume"])
    if not run.results:
        flags = ["--task", "DIR", "--encoder", run.folder / "encoder.pt"]
        return _shell(["python", "-m", "medmoco.segment", *flags])
    given = [run.config.get(name) for name in ("data", "task")]
    if module == "medmoco.train" and given == [None, None]:
        return "python -m medmoco.train --data DIR --task DIR --output runs/first"
    if module is None or not isinstance(seed, int):
        return _shell(["python", "-m", "medmoco.report", run.folder])
    other = _beside(run, f"seed{seed + 1}")
    repeat = _shell([*_with_config(run), "--seed", seed + 1, "--output", other])
    return f"{repeat} && {_shell(['python', '-m', 'medmoco.report', run.folder, other])}"


def duration(value: object) -> str:
    """Seconds as a reader says them: 4.2 s, 3 min 20 s, 2 h 05 min."""
    seconds = finite(value)
    if seconds is None:
        return DASH
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _heads(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs] if len(runs) > 1 else ["Value"]


def _recorded(records: Sequence[Record], key: str) -> list[float]:
    return [value for record in records if (value := finite(record.get(key))) is not None]


def _plain(config: Record, name: str) -> str:
    """A configuration value as it stands in the file; null where there is none."""
    if name not in config:
        return DASH
    value = config[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _module(run: Run) -> str | None:
    command = run.config.get("command")
    return f"medmoco.{command}" if isinstance(command, str) and command.isidentifier() else None


def _with_config(run: Run) -> list[object]:
    return ["python", "-m", _module(run), "--config", run.folder / CONFIG_NAME]


def _beside(run: Run, suffix: str) -> Path:
    return run.folder.parent / f"{run.name}-{suffix}"


def _shell(words: Sequence[object]) -> str:
    return shlex.join(str(word) for word in words)
