"""What the compiler made of the CUDA kernels: no spills, and the instructions that they are for.

A kernel whose variables do not fit its registers still computes the right thing, only slowly, so no
other test would notice. MEDMOCO_REQUIRE_CUDA_BUILD=1 makes it a failure that there is nothing to
look at.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

from medmoco import _C

# Kernels on the tensor cores, by a regular expression for their names, and what their machine code
# has to hold: products (HMMA), reads of shared memory in fragments (LDSM; LDS by element), copies
# that bypass registers (LDGSTS).
NEEDED_INSTRUCTIONS = {
    "queue_info_nce_forward_kernel": ("HMMA", "LDSM", "LDGSTS"),
    "dense_match_forward_kernel": ("HMMA", "LDS", "LDGSTS"),
    r"dense_match_forward_kernel<.*\(medmoco::MapLayout\)0": ("LDSM",),  # channels last
    "centred_moment_kernel": ("HMMA",),  # converts between loads and stores, so no LDGSTS
    r"centred_moment_kernel<.*\(medmoco::MapLayout\)0": ("LDSM",),
    "centred_apply_kernel": ("HMMA", "LDSM"),
}

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
#include "primitives.cuh"

namespace probe {
template <int kValues>
__global__ void many_values(float* data) {  // all of them are alive at once
  float values[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = data[i * 32 + threadIdx.x];
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = values[i] * values[(i + 1) % kValues] + j;
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) data[i * 32 + threadIdx.x] = values[i];
}
template __global__ void many_values<40>(float*);

__global__ void copy(float* data) { data[threadIdx.x] = data[threadIdx.x + 32]; }

__global__ void multiply(const float4* data, float* sum) {
  unsigned char* row = medmoco::shared_memory() + 16 * threadIdx.x;
  medmoco::cp_async<16>(row, data + threadIdx.x, true);
  medmoco::cp_async_commit();
  medmoco::cp_async_wait<0>();
  medmoco::block_barrier();
  uint32_t a[4];
  medmoco::ldmatrix(a, row);
  float sums[4] = {};
  medmoco::mma_m16n8k16<medmoco::BFloat16>(sums, a, a[0], a[1]);
  for (int i = 0; i < 4; ++i) sum[4 * threadIdx.x + i] = sums[i];
}
}
"""


class Kernel(NamedTuple):
    architecture: str  # such as sm_90a
    name: str  # demangled


@dataclass(frozen=True)
class Usage:
    registers: int  # of a thread
    stack: int  # bytes of a thread in local memory: spills, and arrays that are indexed at run time
    shared: int  # bytes of a block, besides what a launch adds
    local: int  # bytes of a thread


def nothing_to_check(reason: str) -> NoReturn:
    if os.environ.get("MEDMOCO_REQUIRE_CUDA_BUILD") == "1":
        pytest.fail(f"MEDMOCO_REQUIRE_CUDA_BUILD=1, but {reason}")
    pytest.skip(reason)


def find_tool(name: str) -> Path | None:
    """A program of the CUDA toolkit; Triton, which comes with torch, brings some of them too."""
    places = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    on_path = shutil.which(name)
    places += [Path(on_path).parent] if on_path else []
    places.append(Path("/usr/local/cuda/bin"))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return next((place / name for place in places if (place / name).is_file()), None)


def dump(what: str, binary: Path) -> str:
    """What cuobjdump tells of a binary, with kernels under their demangled names."""
    tool = find_tool("cuobjdump")
    if tool is None:
        nothing_to_check("found no cuobjdump: not in CUDA_HOME, on the PATH or in triton")
    search = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"  # it runs nvdisasm
    result = subprocess.run(
        [tool, f"--dump-{what}", binary],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": search},
    )
    assert result.returncode == 0, result.stderr
    return re.sub(r"(?<=Function )(: )?(\w+)(?=:?$)", demangled, result.stdout, flags=re.M)


def demangled(match: re.Match[str]) -> str:
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_char_p
    name = library.__cxa_demangle(match[2].encode(), None, None, None)
    return match[2] if name is None else name.decode()


def resource_usage(report: str) -> dict[Kernel, Usage]:
    usages, architecture, name = {}, "", ""
    for line in report.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r" Function (.+):$", line):
            name = found[1]
        elif found := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            usages[Kernel(architecture, name)] = Usage(*map(int, found.groups()))
    return usages


def spills(usages: dict[Kernel, Usage]) -> list[str]:
    return [
        f"{kernel.architecture}: {kernel.name} uses {usage.stack + usage.local} bytes of local "
        f"memory a thread, with {usage.registers} registers"
        for kernel, usage in usages.items()
        if usage.stack + usage.local
    ]


def instructions(listing: str) -> dict[Kernel, set[str]]:
    """The names of the instructions in each kernel's machine code, without their suffixes."""
    found: dict[Kernel, set[str]] = {}
    architecture, current = "", set[str]()
    for line in listing.splitlines():
        if match := re.match(r"\s+code for (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s+Function (.+)$", line):
            current = found.setdefault(Kernel(architecture, match[1]), set())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)", line):
            current.add(match[1])
    return found


@pytest.fixture(scope="module")
def extension() -> Path:
    if _C.build_info()["cuda_version"] is None:
        nothing_to_check("medmoco was built for the CPU only")
    return Path(_C.__file__)


@pytest.fixture(scope="module")
def usages(extension) -> dict[Kernel, Usage]:
    return resource_usage(dump("resource-usage", extension))


@pytest.fixture(scope="module")
def code(extension) -> dict[Kernel, set[str]]:
    return instructions(dump("sass", extension))


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """Compiles the probe with at most so many registers."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        nothing_to_check("found no nvcc: not in CUDA_HOME or on the PATH")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cu").write_text(PROBE)

    def compiled(registers: int) -> Path:
        binary = folder / f"{registers}.cubin"
        flags = ["-cubin", "-arch=sm_80", "-std=c++20", f"-I{ROOT}/csrc/cuda"]
        flags += [f"--maxrregcount={registers}", "-o", binary]
        subprocess.run([nvcc, *flags, folder / "probe.cu"], check=True, timeout=120)
        return binary

    return compiled


def test_every_kernel_is_compiled_for_every_architecture(usages):
    architectures = {kernel.architecture for kernel in usages}
    listed = re.findall(r"(\d+)\.(\d+\w?)", _C.build_info()["cuda_architectures"])
    assert architectures >= {f"sm_{major}{minor}" for major, minor in listed}
    names = {kernel.name for kernel in usages}
    assert names and usages.keys() == {Kernel(a, name) for a in architectures for name in names}
    assert all("medmoco::" in name for name in names), names
    assert all(usage.registers > 0 for usage in usages.values())


def test_no_kernel_uses_local_memory(usages):
    assert spills(usages) == []


@pytest.mark.parametrize("name", NEEDED_INSTRUCTIONS)
def test_kernel_uses_the_instructions_it_is_written_for(name, code):
    kernels = {kernel: found for kernel, found in code.items() if re.search(name, kernel.name)}
    assert kernels, f"{name} is not compiled"
    for kernel, found in kernels.items():
        assert found >= set(NEEDED_INSTRUCTIONS[name]), kernel


def test_a_spill_is_found_and_named(probe):
    (spill,) = spills(resource_usage(dump("resource-usage", probe(32))))
    assert "void probe::many_values<40>(float*) uses" in spill and "with 32 registers" in spill
    assert spills(resource_usage(dump("resource-usage", probe(255)))) == []


def test_instructions_are_found_by_kernel(probe):
    found = instructions(dump("sass", probe(32)))
    assert {kernel.architecture for kernel in found} == {"sm_80"}
    by_name = {kernel.name.partition("(")[0]: names for kernel, names in found.items()}
    copy, multiply = by_name["probe::copy"], by_name["probe::multiply"]
    assert {"LDG", "STG", "FFMA", "LDL", "STL"} <= by_name["void probe::many_values<40>"]
    assert {"LDG", "STG"} <= copy and not {"FFMA", "LDL", "HMMA"} & copy
    assert {"HMMA", "LDSM", "LDGSTS"} <= multiply and "LDL" not in multiply
