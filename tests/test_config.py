"""Flags, defaults and config.json of one dataclass."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from medmoco.config import option, parse, read_config, to_json
from medmoco.errors import UserError


@dataclass(frozen=True)
class Example:
    data: Path | None = option(None, "folder")
    output: Path | None = option(None, "folder of the run")
    method: str = option("medmoco", "preset", choices=("mocov2", "medmoco"))
    stride: int | None = option(None, "cells", choices=(4, 8))
    lr: float = option(0.03, "100 % of the learning rate")
    image_size: int = option(64, "pixels")
    controls: bool = option(True, "run the controls too")
    resume: bool = option(False, "go on")
    device: str | None = option(None, "cpu or cuda")
    models: tuple[Path, ...] = option((), "files")
    temperature: float = option(0.2, "of the logits", above=0)
    crop_min: float = option(None, "share", above=0, most=1)
    epochs: int = option(None, "passes", least=1)

    RESUME_MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"device"})


def read(*argv: str) -> Example:
    return parse(Example, argv, prog="medmoco example", description="An example.")


def config_file(folder: Path, **values) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def test_no_flags_give_the_defaults():
    assert read() == Example()


def test_flags_are_parsed_to_the_types_of_the_fields():
    flags = "--data a/b --lr 1 --image-size 96 --stride 8 --no-controls"
    config = read(*flags.split())
    assert config == Example(data=Path("a/b"), lr=1.0, image_size=96, stride=8, controls=False)
    assert isinstance(config.lr, float)


def test_flag_of_several_values_goes_through_the_configuration_file(tmp_path):
    config = read("--models", "a", "b/c", "--lr", "1")
    assert config.models == (Path("a"), Path("b/c"))
    path = config_file(tmp_path, **to_json(config))
    assert read("--config", str(path)) == config
    assert read("--config", str(path), "--models", "d").models == (Path("d"),)
    for wrong, message in ((["a", 1], "of type Path, got 1"), ("a", "must be a list")):
        with pytest.raises(UserError, match=message):
            read_config(Example, config_file(tmp_path, models=wrong))


def test_flags_win_over_the_configuration_file(tmp_path):
    path = config_file(tmp_path, method="mocov2", lr=0.5, image_size=32)
    config = read("--config", str(path), "--lr", "0.25", "--method", "medmoco")
    assert (config.method, config.lr, config.image_size) == ("medmoco", 0.25, 32)


def test_flag_at_its_default_still_wins_over_the_configuration_file(tmp_path):
    path = config_file(tmp_path, lr=0.5, controls=False)
    assert read("--config", str(path), "--lr", "0.03", "--controls") == Example()


def test_written_configuration_reads_back_as_the_same(tmp_path):
    config = Example(data=Path("/a/b"), stride=4, controls=False)
    path = config_file(tmp_path, medmoco="0.1.0", command="train", **to_json(config))
    assert read("--config", str(path)) == config


def test_entries_of_other_commands_are_passed_over(tmp_path):
    path = config_file(tmp_path, medmoco="0.1.0", command="train", argv=["--x"], unknown=[1])
    assert read_config(Example, path) == {}


def test_whole_number_in_the_file_is_taken_as_a_float(tmp_path):
    values = read_config(Example, config_file(tmp_path, lr=1))
    assert values == {"lr": 1.0} and isinstance(values["lr"], float)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"lr": "fast"}, "lr must be of type float, got 'fast'"),
        ({"lr": True}, "lr must be of type float, got True"),
        ({"lr": float("nan")}, "expected a readable JSON file: NaN is no JSON"),
        ({"image_size": 3.5}, "image_size must be of type int, got 3.5"),
        ({"image_size": None}, "image_size must be of type int, got None"),
        ({"controls": 1}, "controls must be of type bool, got 1"),
        ({"data": ["a"]}, "data must be of type Path"),
        ({"method": "simclr"}, r"method must be one of \['mocov2', 'medmoco'\], got 'simclr'"),
        ({"stride": 16}, r"stride must be one of \[4, 8\], got 16"),
    ],
)
def test_wrong_value_in_the_file_is_named(tmp_path, entry, message):
    path = config_file(tmp_path, **entry)
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        read("--config", str(path))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"3", b"[" * 100_000])
def test_file_that_is_no_json_object_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}: expected a"):
        read("--config", str(path))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json: expected a readable JSON file"):
        read("--config", str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize(
    "argv",
    [
        ("--image-size", "large"),
        ("--lr", "nan"),
        ("--lr", "fast"),
        ("--method", "simclr"),
        ("--stride", "5"),
        ("--metho", "mocov2"),
        ("--no-resume",),
        ("--lr",),
    ],
)
def test_unknown_and_abbreviated_flags_and_values_end_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        read(*argv)
    assert ended.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 0.0, "above 0, got 0.0"),
        ("crop_min", -0.5, "above 0, got -0.5"),
        ("crop_min", 2.0, "of at most 1, got 2.0"),
        ("epochs", 0, "of at least 1, got 0"),
    ],
)
def test_number_out_of_range_is_named(tmp_path, name, value, message):
    flag = "--" + name.replace("_", "-")
    path = config_file(tmp_path, **{name: value})
    for argv in ((flag, str(value)), ("--config", str(path))):
        with pytest.raises(UserError, match=f"{flag}: expected a value {message}"):
            read(*argv)


def test_numbers_at_their_limits_are_taken():
    assert read("--crop-min", "1", "--epochs", "1") == Example(crop_min=1.0, epochs=1)


def test_mistyped_flag_is_told_in_one_line_with_the_one_that_was_meant(capsys):
    with pytest.raises(SystemExit):
        read("--epoch", "3")
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "unrecognized arguments: --epoch 3, did you mean --epochs?" in line
    assert "--help lists the flags" in line


def test_help_shows_the_flags_of_a_command_before_those_that_it_inherits(capsys):
    @dataclass(frozen=True)
    class Larger(Example):
        task: str = option("none", "what this command adds")

    with pytest.raises(SystemExit):
        parse(Larger, ["--help"], prog="", description="")
    words = capsys.readouterr().out
    assert words.index("--task") < words.index("--epochs")


def test_help_shows_defaults_and_percent_signs(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    words = " ".join(capsys.readouterr().out.split())
    assert "100 % of the learning rate (default: 0.03)" in words
    assert "--no-controls" in words and "--no-resume" not in words


def test_resumed_run_takes_its_flags_from_its_own_folder(tmp_path):
    config_file(tmp_path, method="mocov2", lr=0.5, device="cuda")
    config = read("--resume", "--output", str(tmp_path), "--device", "cpu", "--lr", "0.5")
    assert config == Example(output=tmp_path, method="mocov2", lr=0.5, device="cpu", resume=True)


def test_resumed_run_cannot_change_what_it_was_started_with(tmp_path):
    config_file(tmp_path, method="mocov2")
    with pytest.raises(UserError, match="was started with --method mocov2, got medmoco"):
        read("--resume", "--output", str(tmp_path), "--method", "medmoco")


def test_resumed_run_may_spell_a_path_in_another_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config_file(tmp_path, data="scans", models=["a", "b"])
    several = ["--models", "b/../a", str(tmp_path / "b")]
    config = read("--resume", "--output", ".", "--data", str(tmp_path / "scans"), *several)
    assert config.data == Path("scans")
    with pytest.raises(UserError, match="was started with --models a b, got b a; leave"):
        read("--resume", "--output", ".", "--models", "b", "a")


def test_resume_needs_the_folder_of_a_run(tmp_path):
    with pytest.raises(UserError, match="--resume: expected --output"):
        read("--resume")
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        read("--resume", "--output", str(tmp_path))
