"""Builds medmoco._C: every operator's C++ and, where a CUDA compiler fits torch, CUDA kernels.

Environment: MEDMOCO_CUDA=0 builds for the CPU alone, FORCE_CUDA=1 insists on CUDA, CUDA_HOME and
TORCH_CUDA_ARCH_LIST mean what they mean to torch, MAX_JOBS limits the compilers run at once.
"""

import contextlib
import glob
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from setuptools import Extension, setup

ROOT = Path(__file__).parent
TORCH_TARGET = (2, 11)  # the oldest torch that the built extension runs with
CUDA_ARCHITECTURES = "8.0+PTX;9.0a"


def find_cuda_home() -> Path | None:
    """The first folder that holds both nvcc and the runtime's headers."""
    nvcc = shutil.which("nvcc")
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc:  # a link or a script on the PATH need not lie in the toolkit
        guesses += [str(Path(nvcc).parents[1]), str(Path(nvcc).resolve().parents[1])]
    guesses.append("/usr/local/cuda")
    guesses += sorted(glob.glob(f"{sysconfig.get_path('purelib')}/nvidia/cu[0-9]*"), reverse=True)
    for home in map(Path, filter(None, guesses)):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def cuda_release(cuda_home: Path) -> str:
    """Such as 13.0, as `nvcc --version` prints it."""
    text = subprocess.check_output([cuda_home / "bin/nvcc", "--version"], text=True)
    release = re.search(r"release (\d+\.\d+)", text)
    if release is None:
        raise SystemExit(f"medmoco: {cuda_home}/bin/nvcc --version names no release:\n{text}")
    return release[1]


def reason_against_cuda(cuda_home: Path | None) -> str | None:
    """Why CUDA cannot be built, or None. Whether a GPU is visible does not matter: clusters build
    on nodes without one.
    """
    if cuda_home is None:
        return "found no CUDA toolkit (nvcc and cuda_runtime.h); CUDA_HOME names its folder"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build; FORCE_CUDA=1 compiles CUDA regardless"
    release = cuda_release(cuda_home)
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"{cuda_home} is CUDA {release} but torch {torch.__version__} was built with CUDA "
            f"{torch.version.cuda}, and the major versions must agree; CUDA_HOME chooses another "
            "toolkit, FORCE_CUDA=1 compiles regardless"
        )
    return None


def choose_cuda() -> Path | None:
    """The CUDA toolkit to build with, or None for a CPU-only build."""
    if os.environ.get("MEDMOCO_CUDA") == "0":
        say("building for the CPU only, as MEDMOCO_CUDA=0 asks")
        return None
    cuda_home = find_cuda_home()
    reason = reason_against_cuda(cuda_home)
    if os.environ.get("FORCE_CUDA") == "1":
        if cuda_home is None:
            raise SystemExit(f"medmoco: FORCE_CUDA=1, but {reason}")
        # torch.utils.cpp_extension refuses a toolkit of another major version. Ours may differ:
        # cudart is linked statically and no CUDA library of torch's is.
        torch.version.cuda = cuda_release(cuda_home)
        return cuda_home
    if reason:
        say(f"building for the CPU only: {reason}")
        return None
    return cuda_home


def say(message: str) -> None:
    """pip shows a build's output only when it fails or with -v, but leaves the terminal itself."""
    text = f"\n{'=' * 80}\nmedmoco: {message}\n{'=' * 80}\n"
    print(text, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        Path("/dev/tty").write_text(text)


cuda_home = choose_cuda()
if cuda_home:
    # Read when torch.utils.cpp_extension is imported; its own guess may lack the headers.
    os.environ["CUDA_HOME"] = str(cuda_home)
    # Without a list and without a GPU torch raises an IndexError.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)

from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths  # noqa: E402


class BuildOperators(BuildExtension):
    """Compiles again only what changed, and adds what pyproject.toml alone tells."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Ninja finds out what changed. Without it setuptools would look at the sources alone, and
        # keep a library of old headers, or one without the kernels that are now asked for.
        self.force = True
        # For an editable install setuptools would take another folder for objects each time.
        python = f"{self.plat_name}-{sys.implementation.cache_tag}"
        self.build_temp = str(ROOT / "build" / f"objects-{python}-torch-{torch.__version__}")

    def build_extensions(self) -> None:
        forget_stale_kernels(Path(self.build_temp))
        version = self.distribution.get_version()
        for extension in self.extensions:
            for flags in extension.extra_compile_args.values():
                flags.append(f'-DMEDMOCO_VERSION="{version}"')
        super().build_extensions()


def forget_stale_kernels(objects: Path) -> None:
    """Deletes what was compiled of .cu files before any header of ours changed.

    Ninja does that for .cpp files. What nvcc lists as read holds torch's headers, too, which an
    isolated build finds in a folder that is gone the next time.
    """
    headers = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".inl")]
    changed = max(path.stat().st_mtime for path in headers)
    for source in (ROOT / "csrc").rglob("*.cu"):
        compiled = objects / source.relative_to(ROOT).with_suffix(".o")
        if compiled.exists() and compiled.stat().st_mtime < changed:
            compiled.unlink()


def extension() -> Extension:
    """The one extension. Kernels use LibTorch's stable ABI, so it outlives torch upgrades.

    It must load into a torch without CUDA: cudart is linked statically, libtorch_cuda not at all.
    """
    import pybind11

    target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    common = [target, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}"]
    cxx = [*common, "-fvisibility=hidden", "-Wall", "-Wextra"]
    cxx += ["-fno-math-errno"]  # nobody reads errno, and square roots are then taken in vectors
    # GCC notes, for each header, that vectors wider than the baseline change the calling
    # convention; ours are always inlined.
    cxx += ["-Wno-psabi", "-Wno-unknown-pragmas"]
    nvcc = [*common, "-Xcompiler", "-fvisibility=hidden", "-Xcompiler", "-Wall", "-lineinfo"]
    nvcc += ["--threads=2"]  # the architectures side by side
    # Not by -I: an isolated build finds these in another folder each time, and a command that
    # differs would compile again.
    os.environ["TORCH_EXTENSION_SKIP_NVCC_GEN_DEPENDENCIES"] = "1"
    headers = [*include_paths("cuda" if cuda_home else "cpu"), pybind11.get_include()]
    known = os.environ.get("CPLUS_INCLUDE_PATH")
    os.environ["CPLUS_INCLUDE_PATH"] = os.pathsep.join([*headers, *([known] if known else [])])
    libraries = ["torch_cpu"]
    link = ["-Wl,--as-needed", "-Wl,--exclude-libs,ALL"] if platform.system() == "Linux" else []
    sources = glob.glob("csrc/*.cpp") + glob.glob("csrc/cpu/*.cpp")
    folders = library_paths()
    if cuda_home:
        sources += glob.glob("csrc/cuda/*.cu")
        folders += [str(cuda_home / "lib64"), str(cuda_home / "lib")]
        libraries += ["cudart_static", "dl", "rt", "pthread"]
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
        release = f'-DMEDMOCO_CUDA_VERSION="{cuda_release(cuda_home)}"'
        cxx += [release, f'-DMEDMOCO_CUDA_ARCHITECTURES="{architectures}"']
        nvcc.append(release)  # another toolkit in the same folder compiles again
    return Extension(
        "medmoco._C",
        sorted(sources),
        library_dirs=folders,
        libraries=libraries,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        language="c++",
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildOperators})
