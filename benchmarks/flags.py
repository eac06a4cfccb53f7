"""Flags that the benchmarks share, refused alike."""

import argparse
from pathlib import Path

import torch


def parser_for(doc: str | None) -> argparse.ArgumentParser:
    """Of a command whose help is its module's docstring; flags are to be written out."""
    description, _, rest = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def chosen_device(parser: argparse.ArgumentParser, name: str | None) -> torch.device:
    """--device, or CUDA where there is a GPU. Exits with status 2 where there is no such device."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device: expected cpu or cuda, got {name}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device: torch sees no {device}")
    return device


def check_files(parser: argparse.ArgumentParser, **files: Path | None) -> None:
    """Exits with status 2 where a file, named after its flag, could not be written."""
    for flag, path in files.items():
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            parser.error(f"--{flag}: expected a file in an existing folder, got {path}")
