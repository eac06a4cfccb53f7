"""Plants bugs in a copy of the CUDA kernels, for tests that expect each to be noticed.

All are planted at once, behind a number that says which one is awake: so one build serves all.
"""

import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++20", "-O1", "-g1", "-w", "-fsanitize=address,undefined"]
FLAGS += ["-fno-sanitize-recover=all"]

# How a bug shows.
RACE = "race on shared bytes"
OUTSIDE = "AddressSanitizer: heap-buffer-overflow"


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    old: str  # stands once in the file, or is the first after `after`, which does
    new: str
    caught: str  # a regular expression for what the program prints
    after: str = ""


def place_of(bug: Bug, text: str) -> int:
    if not bug.after:
        assert text.count(bug.old) == 1, f"{bug.name}: {bug.old} stands once in {bug.file}"
        return text.index(bug.old)
    assert text.count(bug.after) == 1, f"{bug.name}: {bug.after} stands once in {bug.file}"
    return text.index(bug.old, text.index(bug.after))


def planted(text: str, bugs: list[tuple[int, Bug]]) -> str:
    """The text of a file with these numbered bugs in it, asleep."""
    alternatives = defaultdict(list)
    for number, bug in bugs:
        place = place_of(bug, text)
        alternatives[place, place + len(bug.old)].append((number, bug.new))
    for (start, end), choices in sorted(alternatives.items(), reverse=True):
        code = text[start:end]
        for number, new in choices:
            if ";" in text[start:end]:  # statements; a comment may end them
                code = f"if (planted_bug == {number}) {{ {new} }} else {{ {code}\n}}"
            else:
                code = f"(planted_bug == {number} ? ({new}) : ({code}))"
        text = text[:start] + code + text[end:]
    return text


def copy_of_kernels(folder: Path, bugs: Sequence[Bug]) -> Path:
    """csrc/ with the bugs in it; the first has number 1."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    for file in {bug.file for bug in bugs}:
        path = sources / "cuda" / file
        here = [(i, bug) for i, bug in enumerate(bugs, 1) if bug.file == file]
        path.write_text(planted(path.read_text(), here))
    return sources


def build(sources: Path, main: str) -> Path:
    """The program of tests/emulator/<main>, which takes the number of a bug; 0 is none."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    header = sources.parent / "planted_bug.h"
    header.write_text("#pragma once\ninline int planted_bug = 0;\n")
    program = sources.parent / "planted_bugs"
    command = [COMPILER, *FLAGS, "-include", header, f"-I{sources}"]
    command += [ROOT / "tests/emulator" / main, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return program


def run(program: Path, number: int) -> tuple[int, str]:
    result = subprocess.run(
        [program, str(number)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return result.returncode, result.stdout
