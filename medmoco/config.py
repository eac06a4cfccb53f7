"""Configuration: a frozen dataclass is at once the flags, the defaults and config.json."""

import argparse
import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from medmoco.distributed import launch
from medmoco.errors import UserError
from medmoco.json_file import read_object
from medmoco.printing import brief

Config = TypeVar("Config")

MAX_SEED = 2**63 - 1  # what torch.manual_seed takes and a JSON reader keeps


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """A dataclass field that becomes the flag --name-with-dashes.

    Its type is taken from the annotation: bool becomes a switch, Path, int, float and str are
    parsed, `X | None` accepts what X accepts, and `tuple[X, ...]` one or more of them. A default of
    None under the annotation `X` means that the method or the data decides before the value is
    used. A number lies above `above`, and within `least` and `most`.
    """
    limits = {"above": above, "least": least, "most": most}
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices} | limits)


def parse(cls: type[Config], argv: Sequence[str] | None, *, prog: str, description: str) -> Config:
    """Reads flags into a `cls`.

    --config FILE.json supplies defaults, and flags win over it. --resume takes everything from the
    run's own config.json, where a flag may only change what a `cls` names in `RESUME_MAY_CHANGE`.

    Raises:
        UserError: a configuration file is broken, a flag contradicts the run to be resumed, or a
            number is out of range.
    """
    usage = f"{prog} [--flag VALUE ...]"
    parser = _Parser(prog=prog, usage=usage, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json of an earlier run")
    hints, own = typing.get_type_hints(cls), inspect.get_annotations(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    for field in sorted(fields, key=lambda field: field.name not in own):  # then what is inherited
        _add_flag(parser, field, hints[field.name])
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.refuse_unknown(unknown, [_flag(field.name) for field in fields])
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(known).items()
    }
    config_file = given.pop("config", None)
    if launch().elastic and {"output", "resume", "overwrite"} <= {field.name for field in fields}:
        _follow_restarts(given)
    if given.get("resume"):
        values = _resumed(cls, given)
    else:
        values = (read_config(cls, config_file) if config_file else {}) | given
    for field in fields:
        _check_limits(field, values.get(field.name))
    return cls(**values)


class _Parser(argparse.ArgumentParser):
    """Errors in one line: the usage of fifty flags would push them off the screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")

    def refuse_unknown(self, unknown: list[str], flags: list[str]) -> NoReturn:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        meant = f", did you mean {near[0]}?" if near else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_limits(field: dataclasses.Field[Any], value: Any) -> None:
    if value is None:
        return
    above, least, most = (field.metadata.get(name) for name in ("above", "least", "most"))
    for limit, kept, words in (
        (above, above is None or value > above, "above"),
        (least, least is None or value >= least, "of at least"),
        (most, most is None or value <= most, "of at most"),
    ):
        if not kept:
            raise UserError(f"{_flag(field.name)}: expected a value {words} {limit}, got {value}")


def _follow_restarts(given: dict[str, Any]) -> None:
    """torchrun repeats one command line: what it has begun is resumed, what has not begins.

    A run that was there before is resumed with --resume only. Without it, config.json tells which
    torchrun began the run, by a name that only the machine of rank 0 knows.

    Raises:
        UserError: a restart would delete the run that it is to go on with, or not know it.
    """
    launched, output = launch(), given.get("output")
    if given.get("overwrite") and launched.may_restart:
        raise UserError(
            "--overwrite: torchrun's restarts would delete the run that they are to go on with; "
            "delete its folder yourself, or leave --max-restarts out"
        )
    if launched.may_restart and launched.local_world < launched.world and not given.get("resume"):
        raise UserError(
            "--max-restarts: expected --resume with it on several machines, which begins a run "
            "that has not begun, got none"
        )
    if output is None or not (launched.restarts or given.get("resume")):
        return
    path = Path(output) / "config.json"
    if path.is_file():
        given["resume"] = bool(given.get("resume")) or begun_by(path) == launched.agent
    else:
        given["resume"] = False


def begun_by(path: Path) -> str | None:
    """The torchrun that began the run of a config.json, None where none did."""
    agent = read_object(path).get("torchrun")
    return agent if isinstance(agent, str) and agent else None


def _resumed(cls: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    """The values of the run's own config.json, and what the flags may change."""
    if "output" not in given:
        raise UserError("--resume: expected --output with the folder of the run, got none")
    path = Path(given["output"]) / "config.json"
    if not path.is_file():
        raise UserError(f"--resume: {path} does not exist, so there is no run to resume")
    values = read_config(cls, path)
    free = {"output", "resume", *cls.RESUME_MAY_CHANGE}
    for name in given.keys() - free:
        if name in values and _located(values[name]) != _located(given[name]):
            raise UserError(
                f"--resume: {path} was started with {_flag(name)} {_written(values[name])}, "
                f"got {_written(given[name])}; leave the flag out, or choose another --output"
            )
    # A path stays as it was spelled: what was finished is known by it.
    return given | values | {name: given[name] for name in given.keys() & free}


def _located(value: Any) -> Any:
    """A file is the same however its path is spelled."""
    if isinstance(value, tuple):
        return tuple(map(_located, value))
    return value.resolve() if isinstance(value, Path) else value


def _written(value: Any) -> str:
    """A value as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def to_json(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON values, paths as strings."""
    values = dataclasses.asdict(config)
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def read_config(cls: type[Any], path: Path) -> dict[str, Any]:
    """The fields of `cls` that a config.json sets; what belongs to other commands is passed over.

    Raises:
        UserError: the file cannot be read, is no JSON object, a value has the wrong type, or it is
            of a command that `cls` names in `OTHER_MEANING_IN`.
    """
    values = read_object(Path(path))
    command = values.get("command")
    if isinstance(command, str) and command in getattr(cls, "OTHER_MEANING_IN", ()):
        raise UserError(
            f"{path}: the flags of `medmoco {command}` have other meanings here, such as --epochs"
        )
    hints = typing.get_type_hints(cls)
    return {
        field.name: _checked(path, field, hints[field.name], values[field.name])
        for field in dataclasses.fields(cls)
        if field.name in values
    }


def _checked(path: Path, field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    kind = _unwrap(hint)
    if value is None and field.default is None:
        return None
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise UserError(f"{path}: {field.name} must be a list, got {brief(value)}")
        return tuple(_checked(path, field, typing.get_args(kind)[0], item) for item in value)
    expected: Any = {Path: str, float: (int, float)}.get(kind, kind)
    wrong_bool = isinstance(value, bool) and kind is not bool
    if not isinstance(value, expected) or wrong_bool:
        name = kind.__name__
        raise UserError(f"{path}: {field.name} must be of type {name}, got {brief(value)}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{path}: {field.name} must be a finite number, got {brief(value)}")
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        raise UserError(f"{path}: {field.name} must be one of {list(choices)}, got {brief(value)}")
    return kind(value)


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    kind = _unwrap(hint)
    several: dict[str, Any] = {}
    if typing.get_origin(kind) is tuple:
        kind, several = typing.get_args(kind)[0], {"nargs": "+"}
    flag = _flag(field.name)
    text = field.metadata["help"].replace("%", "%%")
    if field.default is not None and field.default is not False:
        text += f" (default: {field.default})"
    if kind is bool:
        action = argparse.BooleanOptionalAction if field.default else "store_true"
        parser.add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
    else:
        choices = field.metadata.get("choices")
        read = _finite if kind is float else kind
        parser.add_argument(
            flag, type=read, choices=choices, default=argparse.SUPPRESS, help=text, **several
        )


def _finite(text: str) -> float:
    """float() takes nan and inf too, which no flag means and JSON cannot hold."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def _unwrap(hint: Any) -> Any:
    """`X | None` gives X, and so does X."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint
