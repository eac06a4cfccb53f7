"""Bugs planted in the CUDA kernels: the kernels' tests on the emulator catch each."""

import re
from importlib import import_module
from pathlib import Path

import pytest
from planted_bugs.planting import run

FOLDER = Path(__file__).parent / "planted_bugs"
# Those that tell of bugs, by the kernels that they break.
MODULES = {
    path.stem: module
    for path in sorted(FOLDER.glob("*.py"))
    if hasattr(module := import_module(f"planted_bugs.{path.stem}"), "BUGS")
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory, started):
    """Of each kernel, the program with all its bugs asleep in it."""

    tmp_path_factory.getbasetemp()  # made before the threads, which would make one each

    def built(kernel: str) -> Path:
        return MODULES[kernel].build_program(tmp_path_factory.mktemp(kernel))

    return started(built, "kernel")


@pytest.fixture(scope="module")
def outcomes(programs, started):
    """Of each kernel and bug, what the program does once the bug is awake; 0 is none."""

    def outcome(kernel: str, number: int) -> tuple[int, str]:
        return run(programs[kernel,].result(), number)

    return started(outcome, "kernel", "number")


@pytest.mark.parametrize("number", [0])
@pytest.mark.parametrize("kernel", MODULES)
def test_without_a_bug_all_passes(kernel, number, outcomes):
    status, output = outcomes[kernel, number].result()
    assert status == 0, output


@pytest.mark.parametrize(
    ("kernel", "number"),
    [
        pytest.param(kernel, number, id=f"{kernel}-{bug.name}")
        for kernel, module in MODULES.items()
        for number, bug in enumerate(module.BUGS, 1)
    ],
)
def test_is_caught(kernel, number, outcomes):
    status, output = outcomes[kernel, number].result()
    assert status != 0, "nothing noticed"
    assert re.search(MODULES[kernel].BUGS[number - 1].caught, output), output
