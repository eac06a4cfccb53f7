"""What is written down twice stays the same: pins and dependencies."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def requirements(after: str) -> list[str]:
    """The quoted requirements of the list that follows `after` in pyproject.toml."""
    listed = PYPROJECT.split(after, 1)[1].split("]", 1)[0]
    return re.findall(r'"([^"]+)"', listed)


def name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]


def test_hooks_run_the_linters_that_are_pinned():
    pins = dict(pin.split("==") for pin in requirements("dev = ["))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    revisions = dict(re.findall(r"repo: \S+/(\S+)\n    rev: v(\S+)", hooks))
    assert revisions == {
        "ruff-pre-commit": pins["ruff"],
        "mirrors-clang-format": pins["clang-format"],
    }


def test_every_dependency_has_its_reason():
    rows = re.findall(r"^\| (.+?) \| .+ \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    explained = {package for row in rows for package in row.split(", ")}
    lists = (
        "requires = [",
        "\ndependencies = [",
        "test = [",
        "dev = [",
        "tensorboard = [",
        "onnx = [",
    )
    needed = {name(requirement) for listed in lists for requirement in requirements(listed)}
    assert len(needed) > 10
    assert needed <= explained
