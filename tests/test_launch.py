"""From flags to the folders of a run."""

from pathlib import Path

import pytest

from medmoco.errors import UserError
from medmoco.launch import choose_output
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
