"""The script that checks the kernels on a GPU, without one: what it refuses, runs and reports."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_loss
import bench_train
from medmoco import ops

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/gpu_check.sh"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
STEPS = {
    "kernels": ("resources", "shapes", "tests", *TOOLS, "behaviour", "large"),
    "ops": ("info_nce", "info_nce_graph", "match", "features", "features_graph", "many_features"),
    "train": ("train", "train_28", "train_56"),
}
ALL_STEPS = {"build", *(step for steps in STEPS.values() for step in steps)}
# They note how they were called, and fail where a call holds what BROKEN says.
NOTE = """#!/usr/bin/env bash
echo "$(basename "$0") $* UNVERIFIED=$MEDMOCO_UNVERIFIED" >>"$CALLS"
if [[ -n "$BROKEN" && "$*" == *"$BROKEN"* ]]; then echo "it broke here"; exit 3; fi
"""
PYTHON = """case $* in
  *get_device_name*) echo "A made-up GPU" ;;
  *smoke.py*) echo "all ok" ;;
  *find_spec*) echo "$LACKING" ;;
  *benchmarks/bench_*) printf 'a case\\n   medmoco ms  x floor\\na case  1.0  2.0\\n' ;;
esac
"""
SANITIZER = """echo "ERROR SUMMARY: 0 errors"
echo "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
"""


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def tools(tmp_path):
    """Runs the script with programs that only say what is expected of them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {"python": PYTHON, "nvcc": "", "compute-sanitizer": SANITIZER}
    calls = tmp_path / "calls"
    calls.touch()

    def call(*parts, broken="", lacking="", **changed: str):
        for name, text in {**programs, **changed}.items():
            (folder / name).write_text(NOTE + text)
            (folder / name).chmod(0o755)
        search = f"{folder}{os.pathsep}{os.environ['PATH']}"
        environment = {"PYTHON": "python", "PATH": search, "CALLS": str(calls)}
        environment |= {"BROKEN": broken, "LACKING": lacking}
        result = run(tmp_path / "out", *parts, **environment)
        return result, calls.read_text(), tmp_path / "out"

    return call


def outcomes(folder: Path) -> dict[str, str]:
    lines = [line.split(None, 3) for line in (folder / "summary.txt").read_text().splitlines()]
    return {words[0]: words[3] for words in lines if len(words) == 4 and words[2] == "s"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses_and_leaves_nothing(tmp_path):
    result = run(tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr == "gpu_check: torch sees no GPU: nothing can be checked here\n"
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_named(tmp_path):
    (tmp_path / "file").touch()
    for arguments, message in (
        (("a", "train", "b"), "expected the parts kernels, ops, train; got b"),
        ((tmp_path,), f"{tmp_path} is not empty"),
        ((tmp_path / "file",), f"{tmp_path}/file is no folder"),
    ):
        result = run(*arguments)
        assert (result.returncode, result.stderr) == (2, f"gpu_check: {message}\n")
    assert "found no no-such-python" in run(PYTHON="no-such-python").stderr


def test_all_steps_are_run_and_reported(tools):
    result, calls, folder = tools()
    assert result.returncode == 0, result.stdout + result.stderr
    assert outcomes(folder) == dict.fromkeys(ALL_STEPS, "ok")
    summary = (folder / "summary.txt").read_text()
    assert result.stdout.endswith(summary)
    assert "A made-up GPU" in summary and "\n0 steps FAILED" in summary
    for step in (*STEPS["ops"], *STEPS["train"]):
        assert f"\n{step}:\n   medmoco ms  x floor\na case  1.0  2.0\n" in summary
        assert f"--json {folder}/{step}.json --csv {folder}/{step}.csv" in calls
    logs = {path.name for path in folder.iterdir()}
    assert logs == {"summary.txt", *(f"{step}.log" for step in ALL_STEPS)}
    for tool in TOOLS:
        assert f"compute-sanitizer --tool {tool} --error-exitcode 9" in calls
    assert "--graph --sizes N=256,K=65536,C=128" in calls
    work = [line for line in calls.splitlines() if " -c " not in line and "nvcc" not in line]
    assert len(work) == len(ALL_STEPS) and all(line.endswith("UNVERIFIED=1") for line in work)


@pytest.mark.parametrize("part", STEPS)
def test_a_part_is_run_by_itself_after_the_build(part, tools):
    result, _, folder = tools(part)
    assert result.returncode == 0, result.stdout + result.stderr
    assert outcomes(folder) == dict.fromkeys(("build", *STEPS[part]), "ok")


def test_missing_packages_are_named(tools):
    result, calls, folder = tools(lacking="tqdm nibabel")
    assert result.returncode == 2 and not folder.exists() and "pip install" not in calls
    assert result.stderr.endswith("/python lacks packages: tqdm nibabel\n")


@pytest.mark.parametrize(("part", "asked"), [("kernels", False), ("train", True)])
def test_packages_of_the_training_are_needed_for_it_alone(part, asked, tools):
    _, calls, _ = tools(part)
    (looked,) = re.findall(r" matplotlib numpy .* UNVERIFIED", calls)
    assert ("nibabel scipy torchvision" in looked) == asked


@pytest.mark.parametrize(
    ("broken", "step"),
    [
        ("pip install", "build"),
        ("--tool racecheck", "racecheck"),
        ("--part behaviour", "behaviour"),
        ("--graph --sizes N=256,K", "info_nce_graph"),
        ("--output-stride 4", "train_56"),
    ],
)
def test_a_failed_step_does_not_stop_the_next(broken, step, tools):
    result, _, folder = tools(broken=broken)
    assert result.returncode == 1
    failed = {name for name, outcome in outcomes(folder).items() if outcome != "ok"}
    assert outcomes(folder).keys() == ALL_STEPS and failed == {step}
    assert outcomes(folder)[step] == "FAILED: exit status 3"
    assert f"--- the end of {step}.log\nit broke here\n" in result.stdout
    assert "\n1 steps FAILED" in (folder / "summary.txt").read_text()


def test_a_tool_that_says_nothing_has_not_passed(tools):
    result, _, folder = tools(**{"compute-sanitizer": ""})
    assert result.returncode == 1
    found = outcomes(folder)
    assert found["memcheck"] == "FAILED: its output lacks 'ERROR SUMMARY: 0 errors'"
    assert found["racecheck"] == "FAILED: its output lacks '(0 errors, 0 warnings)'"
    assert found["large"] == "ok"


def test_its_files_and_test_modules_exist():
    text = SCRIPT.read_text()
    for name in ("smoke", "bench_loss", "bench_train"):
        assert re.search(rf"(benchmarks/{name}\.py|bench {name}) ", text)
        assert (ROOT / f"benchmarks/{name}.py").is_file()
    (modules,) = re.findall(r"pytest_cuda tests ([^\n]*\\\n[^\n]*)", text)
    modules = set(modules.replace("\\", "").split())
    assert modules == {f"{name}.py" for name in ops.__all__}
    assert all((ROOT / f"tests/test_{module}").is_file() for module in modules)


def test_flags_of_its_benchmarks_are_understood(tools, monkeypatch):
    _, calls, _ = tools("ops", "train")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    parse = {"bench_loss": bench_loss.parse_flags, "bench_train": bench_train.parse_flags}
    found = re.findall(r"^python benchmarks/(bench_\w+)\.py (.*) UNVERIFIED=1$", calls, re.M)
    assert len(found) == len(STEPS["ops"]) + len(STEPS["train"])
    for script, flags in found:
        _, cases = parse[script](shlex.split(flags))
        assert cases and all(case.device.type == "cuda" for case in cases)
