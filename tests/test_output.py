"""Output folders and files that are written whole or not at all."""

import json
import os
import stat

import pytest
import torch

from medmoco.errors import UserError
from medmoco.output import (
    append_jsonl,
    check_output,
    prepare_output,
    save_torch,
    write_bytes_atomic,
    write_json,
    write_text,
)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"medmoco": "0.1.0"}')
    (folder / "encoder.pt").write_bytes(b"weights")
    return folder


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    return folder


# --- the output folder --------------------------------------------------------------------------


def test_new_folder_is_made_with_its_parents(tmp_path):
    folder = prepare_output(tmp_path / "a" / "b", resume=False, overwrite=False)
    assert folder.is_dir()


def test_empty_folder_is_taken(tmp_path):
    assert prepare_output(tmp_path, resume=False, overwrite=False) == tmp_path
    assert prepare_output(tmp_path, resume=False, overwrite=True) == tmp_path


def test_occupied_folder_is_refused_and_left_alone(run):
    with pytest.raises(UserError, match="the folder is not empty; add --resume"):
        prepare_output(run, resume=False, overwrite=False)
    assert (run / "encoder.pt").read_bytes() == b"weights"


def test_what_a_kill_left_before_the_first_file_does_not_occupy_a_folder(tmp_path):
    (tmp_path / ".config.json.k2_x81aq").write_text('{"medm')
    prepare_output(tmp_path, resume=False, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_what_kills_left_of_a_run_is_deleted_when_it_goes_on(run):
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / ".last.pt.0a1b2c3d").write_bytes(b"half")
    (run / ".hidden").write_text("of somebody else")
    prepare_output(run, resume=True, overwrite=False)
    assert list((run / "checkpoints").iterdir()) == []
    assert (run / ".hidden").is_file() and (run / "encoder.pt").is_file()


def test_overwrite_empties_the_folder_of_a_run(run):
    prepare_output(run, resume=False, overwrite=True)
    assert list(run.iterdir()) == []


def test_overwrite_never_deletes_what_is_no_run(documents):
    with pytest.raises(UserError, match=r"--overwrite: .*holds no config\.json"):
        prepare_output(documents, resume=False, overwrite=True)
    assert (documents / "thesis.tex").is_file()


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": "bert"}', "medmoco", "{"])
def test_overwrite_never_deletes_beside_another_programs_config(documents, content):
    (documents / "config.json").write_text(content)
    with pytest.raises(UserError, match="so it is not a run"):
        prepare_output(documents, resume=False, overwrite=True)
    assert (documents / "thesis.tex").is_file()


def test_folder_that_cannot_be_made_is_named(documents):
    below_a_file = documents / "thesis.tex" / "run"
    with pytest.raises(UserError, match=f"--output {below_a_file}: cannot be made: Not a dir"):
        prepare_output(below_a_file, resume=False, overwrite=False)


def test_link_to_a_run_is_not_deleted_as_its_folder(tmp_path, run):
    link = tmp_path / "link"
    link.symlink_to(run)
    with pytest.raises(UserError, match=f"--output {link}: cannot be made: .*symbolic link"):
        prepare_output(link, resume=False, overwrite=True)
    assert (run / "encoder.pt").is_file()


def test_resume_keeps_the_folder_as_it_is(run):
    prepare_output(run, resume=True, overwrite=False)
    prepare_output(run, resume=True, overwrite=True)
    assert (run / "encoder.pt").is_file()


def test_resume_needs_a_run(tmp_path, documents):
    for folder in (documents, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"--resume: .*holds no config\.json"):
            prepare_output(folder, resume=True, overwrite=False)
    assert not (tmp_path / "nowhere").exists()


def test_file_in_place_of_the_folder_is_named(documents):
    with pytest.raises(UserError, match="expected a folder, got a file"):
        prepare_output(documents / "thesis.tex", resume=False, overwrite=True)


def test_checking_touches_nothing(tmp_path, run):
    check_output(tmp_path / "new", resume=False, overwrite=False)
    check_output(run, resume=False, overwrite=True)
    assert not (tmp_path / "new").exists() and (run / "encoder.pt").is_file()


# --- files --------------------------------------------------------------------------------------


def test_file_appears_with_its_content_and_nothing_beside_it(tmp_path):
    write_bytes_atomic(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_file_is_readable_for_others(tmp_path):
    write_text(tmp_path / "a.txt", "é")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644
    assert (tmp_path / "a.txt").read_text("utf-8") == "é"


@pytest.mark.parametrize("failing", ["fsync", "replace", "chmod"])
def test_old_file_survives_a_failure_while_writing(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_interruption_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes_atomic(tmp_path / "a.bin", b"new")
    assert os.listdir(tmp_path) == []


def test_json_has_no_nan_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"dice": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"dice": float("nan")})
    assert json.loads(path.read_text()) == {"dice": 0.5}


def test_tensors_read_back_without_pickles(tmp_path):
    path = tmp_path / "state.pt"
    save_torch(path, {"weight": torch.arange(3.0), "step": 7})
    state = torch.load(path, weights_only=True)
    assert state["step"] == 7 and torch.equal(state["weight"], torch.arange(3.0))


def test_value_that_cannot_be_saved_keeps_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    save_torch(path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_torch(path, {"function": lambda: None})
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["state.pt"]


def test_records_are_appended_a_line_each(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1, "note": "a\nb"})
    append_jsonl(path, {"step": 2})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_record_with_nan_is_not_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_jsonl(path, {"step": 2, "loss": float("inf")})
    assert path.read_text() == '{"step": 1}\n'
