"""Shared fixtures: a small phantom task, the real volumes, the device, programs side by side."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "msd_hippocampus"


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory) -> Path:
    """A Decathlon folder of ten phantoms, 6 slices of 48 x 48 each. Read-only for tests."""
    from medmoco.data.phantom import generate_phantom

    folder = tmp_path_factory.mktemp("phantom") / "task"
    generate_phantom(folder, patients=10, size=48, slices=6, seed=0)
    return folder


@pytest.fixture(scope="session")
def hippocampus() -> Path:
    """The real MR volumes; tests that use it carry the marker `data`."""
    folder = Path(os.environ.get("MEDMOCO_DATA", REAL_DATA))
    if not (folder / "dataset.json").is_file():
        pytest.skip(
            f"no real volumes: {folder} holds no dataset.json (MEDMOCO_DATA sets the place)"
        )
    return folder


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    """Each device in turn. MEDMOCO_REQUIRE_CUDA=1 makes a missing GPU a failure."""
    if request.param == "cuda" and not torch.cuda.is_available():
        if os.environ.get("MEDMOCO_REQUIRE_CUDA") == "1":
            pytest.fail("MEDMOCO_REQUIRE_CUDA=1, but torch sees no CUDA device")
        pytest.skip("torch sees no CUDA device")
    return request.param


@pytest.fixture(scope="module")
def started(request) -> Iterator[Callable[..., dict[tuple[Any, ...], Future[Any]]]]:
    """started(call, *names) starts call(*values) for all values of the parameters `names` in the
    chosen tests of the module, as many at once as there are cores, in the order in which it was
    told, and returns the futures by the tuple of values.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def start(call: Callable[..., Any], *names: str) -> dict[tuple[Any, ...], Future[Any]]:
            tests = [item for item in request.session.items if item.path == request.node.path]
            specs = [test.callspec.params for test in tests if hasattr(test, "callspec")]
            specs = [parameters for parameters in specs if parameters.keys() >= {*names}]
            found = dict.fromkeys(tuple(parameters[name] for name in names) for parameters in specs)
            return {values: pool.submit(call, *values) for values in found}

        yield start
        pool.shutdown(cancel_futures=True)  # of a run that was stopped
