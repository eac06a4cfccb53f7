"""From flags to the folders of a run."""

import json
from pathlib import Path

import pytest
import torch

from medmoco.config import parse
from medmoco.distributed import joined, launch
from medmoco.errors import UserError
from medmoco.launch import choose_output, create_run
from medmoco.pretrain import PretrainConfig


def chosen(**flags) -> PretrainConfig:
    return choose_output(PretrainConfig(**flags), "mocov2")


def test_cache_lies_beside_the_output_and_is_shared_by_its_neighbours(tmp_path):
    caches = {chosen(output=tmp_path / name).cache for name in "ab"}
    assert caches == {tmp_path / ".medmoco-cache"}


def test_cache_of_a_run_in_the_working_folder_lies_outside_of_it(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert chosen(output=Path()).cache == tmp_path / ".medmoco-cache"


def test_cache_inside_the_output_is_refused_before_it_is_made(tmp_path):
    with pytest.raises(UserError, match=r"--cache .*: expected a folder outside of --output"):
        chosen(output=tmp_path / "run", cache=tmp_path / "run" / "cache")
    assert not (tmp_path / "run").exists()


def test_without_a_name_the_run_is_called_by_time_and_method():
    output = chosen().output
    assert output.parent == Path("runs") and output.name.endswith("-mocov2")


def test_rank_without_a_world_size_is_the_only_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (launch().rank, launch().local_rank, launch().world) == (0, 0, 1)


def test_several_ranks_without_a_place_to_meet_are_sent_to_torchrun(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    message = "WORLD_SIZE=2: expected MASTER_ADDR and MASTER_PORT .* torchrun"
    with pytest.raises(UserError, match=message), joined(torch.device("cpu")):
        pass


def under_torchrun(monkeypatch, agent: str, restarts: int, machines: int = 1) -> None:
    """The environment of a rank, less what it takes to meet the others."""
    elastic = {
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_MAX_RESTARTS": "1",
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        "TORCHELASTIC_ERROR_FILE": f"/tmp/logs/{agent}/attempt_{restarts}/0/error.json",
        "WORLD_SIZE": str(2 * machines),
        "LOCAL_WORLD_SIZE": "2",
    }
    for name, value in elastic.items():
        monkeypatch.setenv(name, value)


def started(output: Path, *flags: str) -> PretrainConfig:
    """What every attempt does with the same flags until its folder is made."""
    argv = ["--output", str(output), "--method", "mocov2", "--device", "cpu", *flags]
    config = choose_output(parse(PretrainConfig, argv, prog="test", description=""), "mocov2")
    create_run(config, "pretrain")
    return config


def test_restart_resumes_what_its_own_torchrun_began(tmp_path, monkeypatch):
    under_torchrun(monkeypatch, "none_a", 0)
    assert not started(tmp_path / "run").resume
    under_torchrun(monkeypatch, "none_a", 1)
    assert started(tmp_path / "run").resume


def test_restart_does_not_resume_the_run_that_its_first_attempt_refused(tmp_path, monkeypatch):
    under_torchrun(monkeypatch, "none_a", 0)
    started(tmp_path / "run")
    for restarts in (0, 1):
        under_torchrun(monkeypatch, "none_b", restarts)
        with pytest.raises(UserError, match="the folder is not empty"):
            started(tmp_path / "run")
    assert started(tmp_path / "run", "--resume").resume
    assert json.loads((tmp_path / "run" / "config.json").read_text())["torchrun"] == "none_a"


def test_restart_does_not_resume_a_run_that_no_torchrun_began(tmp_path, monkeypatch):
    started(tmp_path / "run")
    under_torchrun(monkeypatch, "", 1)
    with pytest.raises(UserError, match="the folder is not empty"):
        started(tmp_path / "run")


def test_restarts_on_several_machines_need_resume(tmp_path, monkeypatch):
    under_torchrun(monkeypatch, "none_a", 0, machines=2)
    with pytest.raises(UserError, match="--max-restarts: expected --resume"):
        started(tmp_path / "run")
    assert not started(tmp_path / "run", "--resume").resume
