"""From flags to a run that can start: the device, the output folder, config.json."""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

import torch

import medmoco
from medmoco.config import to_json
from medmoco.distributed import launch
from medmoco.errors import UserError
from medmoco.event_files import require_tensorboard
from medmoco.json_file import read_object
from medmoco.output import CONFIG_NAME, check_output, prepare_output, write_json

Config = TypeVar("Config", bound=Any)  # a configuration with output, cache, resume and overwrite


def choose_device(name: str | None) -> torch.device:
    """--device, or CUDA where there is some.

    Raises:
        UserError: no such device on this machine.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= available:
        raise UserError(f"--device {name}: this machine has {available} CUDA devices for torch")
    return device


def choose_workers(workers: int | None, device: torch.device) -> int:
    """--workers, or loader processes where the training leaves cores for them."""
    if workers is not None:
        return workers
    cores = max(1, (os.cpu_count() or 1) // launch().local_world)
    return 0 if device.type == "cpu" else min(8, cores)


def choose_output(config: Config, name: str) -> Config:
    """--output, or runs/<time>-<name>; the cache beside it. Checked, but nothing is written.

    Raises:
        UserError: the folder cannot be used, see `check_output`, or none is named for several
            ranks, or the cache would lie in it; or there is no --device, or no package for
            --tensorboard, which is better known before volumes are read.
    """
    choose_device(config.device)
    if config.output is None and launch().world > 1:
        raise UserError("--output: expected a folder for all ranks to agree on, got none")
    if config.tensorboard:
        require_tensorboard()
    output = config.output or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    if output.name in ("", ".."):  # "." has no parent to put a cache in
        output = output.resolve()
    check_output(output, resume=config.resume, overwrite=config.overwrite)
    cache = config.cache or output.parent / ".medmoco-cache"
    if cache.resolve().is_relative_to(output.resolve()):
        raise UserError(f"--cache {cache}: expected a folder outside of --output {output}")
    return dataclasses.replace(config, output=output, cache=cache)


def create_run(config: Any, command: str, **more: Any) -> None:
    """Makes the output folder and writes config.json, from which --resume and --config read.

    Args:
        config: the flags.
        command: that makes the run.
        more: what else config.json is to hold.

    Raises:
        UserError: the folder cannot be made, or --resume means a run of another command.
    """
    if config.resume:
        made_by = read_object(config.output / CONFIG_NAME).get("command")
        if made_by != command:
            raise UserError(
                f"--resume: expected a run of `medmoco {command}`, got {config.output} "
                f"of `medmoco {made_by}`"
            )
    prepare_output(config.output, resume=config.resume, overwrite=config.overwrite)
    if not config.resume:
        # A run is made once: how to treat an existing folder is no part of what it is.
        made = dataclasses.replace(config, resume=False, overwrite=False)
        about = {"medmoco": medmoco.__version__, "command": command, "argv": sys.argv[1:]}
        if launch().agent:
            about["torchrun"] = launch().agent
        write_json(config.output / CONFIG_NAME, about | more | to_json(made))
