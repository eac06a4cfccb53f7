"""From flags to a run that can start: the device, the output folder, config.json."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

import torch

import medmoco
from medmoco.config import to_json
from medmoco.output import CONFIG_NAME, check_output, prepare_output, write_json

Config = TypeVar("Config", bound=Any)  # a configuration with output, cache, resume and overwrite


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_output(config: Config, name: str) -> Config:
    """--output, or runs/<time>-<name>; the cache beside it. Checked, but nothing is written.

    Raises:
        UserError: the folder cannot be used, see `check_output`.
    """
    output = config.output or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    check_output(output, resume=config.resume, overwrite=config.overwrite)
    cache = config.cache or output.parent / ".medmoco-cache"
    return dataclasses.replace(config, output=output, cache=cache)


def create_run(config: Any, command: str) -> None:
    """Makes the output folder and writes config.json, from which --resume and --config read."""
    prepare_output(config.output, resume=config.resume, overwrite=config.overwrite)
    if not config.resume:
        # A run is made once: how to treat an existing folder is no part of what it is.
        made = dataclasses.replace(config, resume=False, overwrite=False)
        about = {"medmoco": medmoco.__version__, "command": command, "argv": sys.argv[1:]}
        write_json(config.output / CONFIG_NAME, about | to_json(made))
