"""The emulator that runs CUDA kernels on the CPU, and the kernels on it, under sanitizers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests/emulator"
SEARCHED = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
CMAKE = shutil.which("cmake", path=SEARCHED)


def run(*command: str | Path) -> str:
    result = subprocess.run(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, started):
    """Of each program, what it is to build and run it."""
    if CMAKE is None:
        pytest.skip("cmake is not installed")
    folder = tmp_path_factory.mktemp("emulator")
    run(CMAKE, "-S", SOURCES, "-B", folder)
    # All that compile; what does not, is compiled once more by itself, for its errors.
    parallel = str(min(8, os.cpu_count() or 1))
    subprocess.run([CMAKE, "--build", folder, "--parallel", parallel, "--", "-k"])

    def outcome(name: str) -> str:
        if not (folder / name).exists():
            return run(CMAKE, "--build", folder, "--target", name)
        return run(folder / name)

    return started(outcome, "name")


@pytest.mark.parametrize("name", sorted(path.stem for path in SOURCES.glob("*_test.cpp")))
def test_under_sanitizers(name, outcomes):
    assert "all passed" in outcomes[name,].result()


GPU = [ROOT / f"csrc/cuda/{name}.cuh" for name in ("launch", "memory", "mma", "warp")]
EMULATOR = [ROOT / f"csrc/emulator/{name}.h" for name in ("launch", "number_formats", "primitives")]


def declarations(paths: list[Path]) -> set[str]:
    """The functions for kernels, launch() and the constants, each on one line."""
    text = " ".join("\n".join(path.read_text() for path in paths).split())
    # The emulator also wants to know who calls.
    text = re.sub(r",? ?std::source_location where = std::source_location::current\(\)", "", text)
    functions = re.findall(r"__device__ __forceinline__ ([^;{}]*\)) ?[{;]", text)
    functions += re.findall(r"void launch\([^;{}]*\)", text)
    functions = [function.replace("( ", "(") for function in functions]
    is_primitive = re.compile(r"[\w ]+\*? \w+\(")  # and no specialisation of one, name<...>(
    return {function for function in functions if is_primitive.match(function)} | set(
        re.findall(r"constexpr \w+ kWarp\w+ = \w+", text)
    )


def test_kernels_find_the_same_primitives_on_the_gpu_and_in_the_emulator():
    address = "uint32_t shared_address(const void* address)"  # what only instructions need
    assert declarations(GPU) - {address} == declarations(EMULATOR)


def test_kernels_find_the_same_types_on_the_gpu_and_in_the_emulator():
    emulator = "\n".join(path.read_text() for path in EMULATOR)
    for path in GPU:
        for name in re.findall(r"^using (\w+) =", path.read_text(), re.MULTILINE):
            assert re.search(rf"^(using {name} =|struct {name} {{)", emulator, re.MULTILINE), name
