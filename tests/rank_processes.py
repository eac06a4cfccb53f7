"""Starts a program as two ranks, as torchrun would, but without a launcher in between."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_on_two_ranks(program: Path, *arguments: str) -> list[tuple[str, str]]:
    """What each rank wrote to standard output and standard error; both have ended with 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), *arguments],
            env=os.environ | common | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        written = [process.communicate(timeout=300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, (_, errors) in zip(ranks, written, strict=True):
        assert process.returncode == 0, errors
    return written
