"""How the package is built, and that each operator has all of its parts."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import medmoco
import medmoco.ops
from medmoco import _C

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = re.findall(r'"(\w+)\(Tensor', (ROOT / "csrc/medmoco.cpp").read_text())
OPERATORS = [name for name in SCHEMAS if not name.endswith("_backward")]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=120
    )


def is_registered(schema: str, dispatch_key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"medmoco::{schema}", dispatch_key)


def project_version() -> str:
    return re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def test_build_info_tells_how_the_extension_was_built():
    info = _C.build_info()
    assert info["version"] == project_version()
    assert info["torch_target"] == "2.11"
    assert (info["cuda_version"] is None) == (info["cuda_architectures"] is None)
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert isinstance(info["cpu_features"], list)
    assert info["cpu_kernels"] in ("baseline", "avx2", "avx512")


def test_version_stands_in_one_place():
    assert medmoco.__version__ == project_version()
    files = [ROOT / "setup.py", ROOT / "build_backend.py", ROOT / "CMakeLists.txt"]
    files += [*(ROOT / "medmoco").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    repeated = f"{re.escape(project_version())}(?![0-9])"
    assert [path for path in files if re.search(rf"(?<![0-9.]){repeated}", path.read_text())] == []


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_extension_needs_no_cuda_library():
    read = ["readelf", "--dynamic", "--wide", _C.__file__]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", subprocess.check_output(read, text=True))
    assert "libtorch_cpu.so" in needed
    assert [library for library in needed if "cuda" in library] == []
    assert [library for library in needed if "python" in library] == []


def test_import_without_the_extension_tells_how_to_build_it():
    code = "import sys; sys.modules['medmoco._C'] = None; import medmoco"
    result = run_python("-c", code)
    assert result.returncode == 1
    assert "Build them with: pip install -e ." in result.stderr


@pytest.mark.parametrize("kernels", ["baseline", "avx2", "avx512"])
def test_kernels_of_every_instruction_set_match_the_reference(kernels):
    """Also that the operators import without torchvision, which the script checks."""
    result = run_python(str(ROOT / "tests/abi_check.py"), MEDMOCO_CPU_KERNELS=kernels)
    assert result.returncode == 0, result.stdout + result.stderr
    if f"'cpu_kernels': '{kernels}'" not in result.stdout:
        pytest.skip(f"this machine has no {kernels}")


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_has_all_of_its_parts(operator):
    """The README tells of its CUDA kernels or that there are none, see the next test; the test of
    the benchmark asks for its row.
    """
    for part in ("csrc/cpu/{}.cpp", "medmoco/ops/{}.py", "tests/test_{}.py"):
        assert (ROOT / part.format(operator)).is_file(), part
    module = importlib.import_module(f"medmoco.ops.{operator}")
    for function in (operator, f"{operator}_reference"):
        assert callable(getattr(module, function))
    for schema in (operator, f"{operator}_backward"):
        if schema in SCHEMAS:
            assert is_registered(schema, "CPU"), schema
            assert is_registered(schema, "Meta"), schema
    user_function = getattr(medmoco.ops, operator)
    assert ("Not differentiable" in user_function.__doc__) != (f"{operator}_backward" in SCHEMAS)


@pytest.mark.parametrize("function", medmoco.ops.__all__)
def test_every_function_has_a_module_a_test_module_and_its_kernels_in_the_readme(function):
    assert (ROOT / f"medmoco/ops/{function}.py").is_file()
    assert (ROOT / f"tests/test_{function}.py").is_file()
    readme = (ROOT / "README.md").read_text()
    told = re.search(rf"^\| `{function}` \| .* \| (.*) \| (.*) \|$", readme, re.M)
    assert told, f"README.md: expected a row of {function} in the table of operators"
    assert told.groups() == (kernels("cpu", function), kernels("cuda", function))


def kernels(device: str, function: str) -> str:
    """What csrc/<device> registers of an operator, in the words of the README."""
    passes = []
    for name, schema in (("forward", function), ("backward", f"{function}_backward")):
        for path in (ROOT / "csrc" / device).iterdir():
            source = path.read_text()
            if f'm.impl("{schema}"' in source:
                unverified = "unverified_kernels_enabled()" in source
                passes.append(f"{name} (unverified)" if unverified else name)
    return ", ".join(passes) or "none"


@pytest.mark.skipif(_C.build_info()["cuda_version"] is None, reason="built for the CPU only")
@pytest.mark.parametrize("unverified", ["0", "1"])
def test_cuda_kernels_are_registered_as_the_readme_tells(unverified):
    """Those that no GPU has run only where they are asked for."""
    code = (
        "import sys, torch, medmoco.ops\n"
        "for schema in sys.argv[1:]:\n"
        "    print(torch._C._dispatch_has_kernel_for_dispatch_key(f'medmoco::{schema}', 'CUDA'))"
    )
    result = run_python("-c", code, *SCHEMAS, MEDMOCO_UNVERIFIED=unverified)
    assert result.returncode == 0, result.stderr
    expected = []
    for schema in SCHEMAS:
        told = kernels("cuda", schema.removesuffix("_backward")).split(", ")
        name = "backward" if schema.endswith("_backward") else "forward"
        expected.append(name in told or (f"{name} (unverified)" in told and unverified == "1"))
    assert result.stdout.split() == [str(value) for value in expected]


def test_build_asks_for_torch_only_where_there_is_none(monkeypatch):
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    assert backend._torch_if_missing() == []
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert backend._torch_if_missing() == ["torch>=2.11"]
