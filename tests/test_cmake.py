"""The CMake build: the operators in a C++ program, without Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SEARCHED = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
CMAKE = shutil.which("cmake", path=SEARCHED)

pytestmark = pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")


def run(*arguments: str | Path) -> str:
    result = subprocess.run(
        [CMAKE, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def build_and_test(source: Path, build: Path, *options: str) -> None:
    run("-S", source, "-B", build, *options)
    run("--build", build, "--parallel", "2")
    tested = subprocess.run(
        [Path(CMAKE).with_name("ctest"), "--test-dir", build, "--output-on-failure"],
        capture_output=True,
        text=True,
    )
    assert tested.returncode == 0 and "tests passed" in tested.stdout, tested.stdout


def test_operators_run_in_a_program_of_the_project_and_in_one_that_finds_them_installed(tmp_path):
    """Also where torch was built for CUDA and there is no CUDA toolkit."""
    torch_folder = torch.utils.cmake_prefix_path
    project, installed = tmp_path / "project", tmp_path / "installed"
    options = ["-DMEDMOCO_CUDA=OFF", f"-DCMAKE_PREFIX_PATH={torch_folder}"]
    # Those of the emulator tests/test_emulator.py builds.
    build_and_test(ROOT, project, *options, "-DMEDMOCO_EMULATOR_TESTS=OFF")
    run("--install", project, "--prefix", installed)
    found = f"-DCMAKE_PREFIX_PATH={installed};{torch_folder}"
    build_and_test(ROOT / "tests/cpp", tmp_path / "program", found)


def test_the_tests_of_the_emulator_are_among_the_tests_of_the_project(tmp_path):
    torch_folder = torch.utils.cmake_prefix_path
    run("-S", ROOT, "-B", tmp_path, "-DMEDMOCO_CUDA=OFF", f"-DCMAKE_PREFIX_PATH={torch_folder}")
    ctest = [Path(CMAKE).with_name("ctest"), "--test-dir", tmp_path, "--show-only"]
    listed = subprocess.run(ctest, capture_output=True, text=True).stdout
    for source in (ROOT / "tests/emulator").glob("*_test.cpp"):
        assert f": {source.stem}\n" in listed


def test_configuring_without_torch_tells_what_to_pass(tmp_path):
    options = ["-DMEDMOCO_CUDA=OFF", "-DCMAKE_FIND_USE_CMAKE_ENVIRONMENT_PATH=OFF"]
    command = [CMAKE, "-S", ROOT, "-B", tmp_path, *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "torch.utils.cmake_prefix_path" in result.stderr
