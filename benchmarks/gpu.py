"""What only a GPU has: graphs of kernels that are replayed, and a rate of exponentials."""

import subprocess
from collections.abc import Callable
from typing import TypeVar

import torch

EXPONENTIALS_PER_CLOCK = 16  # of one multiprocessor, by the CUDA programming guide
WARM_UPS = 3  # before a capture, in which nothing may be compiled, loaded or tuned

Result = TypeVar("Result")


def captured(call: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Captures the kernels that a call launches.

    Args:
        call: launches the same kernels on the same memory whenever it is called.
        device: a GPU, the only one that the call uses.

    Returns:
        A function that runs the kernels again. It returns what `call` returned while it was
        captured: the same tensors each time, with new values in them.

    Raises:
        RuntimeError: the call does what a graph cannot hold, such as waiting for a result.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # is left even if the capture fails, unlike that of graph()
            for _ in range(WARM_UPS):
                call()
            with torch.cuda.graph(graph, stream=stream):
                result = call()
        torch.cuda.current_stream().wait_stream(stream)

    def replay() -> Result:
        graph.replay()
        return result

    return replay


def exponentials_per_s(device: torch.device) -> float | None:
    """At the highest clock that the driver allows; None on the CPU, or where nobody tells it."""
    if device.type != "cuda":
        return None
    clock = clock_mhz(device)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return None if clock is None else EXPONENTIALS_PER_CLOCK * multiprocessors * clock * 1e6


def clock_mhz(device: torch.device) -> float | None:
    """The highest clock of the multiprocessors."""
    told = ask_driver("clocks.max.sm", device)
    return float(told) if told.replace(".", "", 1).isdigit() else None


def ask_driver(quantity: str, device: torch.device) -> str:
    """What nvidia-smi tells of a GPU, without its unit; empty where it tells nothing."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    gpu = f"--id=GPU-{uuid.removeprefix('GPU-')}"
    query = (f"--query-gpu={quantity}", "--format=csv,noheader,nounits")
    return first_line("nvidia-smi", gpu, *query)


def first_line(*command: str) -> str:
    """The first line that a program prints; empty if it cannot be run or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (result.stdout.splitlines() or [""])[0].strip()
