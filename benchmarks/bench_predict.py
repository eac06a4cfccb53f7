"""Times the prediction of one volume from file to file, and where the time and the memory go.

    python benchmarks/bench_predict.py
    python benchmarks/bench_predict.py --slices 20 --classes 3 --json FILE

The volume is int16 with slope and intercept, stored LPS and gzipped, as CT comes from a scanner;
the model a U-Net with random weights, whose speed is that of a trained one. Memory is the peak of
the process: first after one batch through the model alone, then after everything. Exit status: 0;
2 for flags that make no sense.
"""

import argparse
import gzip
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from nibabel.nifti1 import Nifti1Header

from flags import check_files, chosen_device, parser_for
from medmoco.data.inputs import Input
from medmoco.data.slices import PixelGrid
from medmoco.data.store import CacheSettings
from medmoco.downstream import unet_stride
from medmoco.models.decoders import UNet
from medmoco.models.encoder import ARCHITECTURES, Encoder
from medmoco.models.segmenter import Segmenter
from medmoco.output import write_json
from medmoco.prediction import INSIDE
from medmoco.volume_prediction import VolumePredictor
from reporting import describe_environment, environment_text

SPACING = (0.75, 0.75, 1.5)  # mm, of an abdominal CT


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts the volume that the flags ask for, and returns the exit status."""
    flags = parse_flags(argv)
    environment = describe_environment(flags.device)
    print(environment_text(environment))
    torch.manual_seed(0)
    segmenter = random_segmenter(flags)
    size = flags.image_size
    with tempfile.TemporaryDirectory() as folder:
        image = write_volume(Path(folder) / "ct.nii.gz", flags.size, flags.slices)
        before = peak_mib()
        predictor = VolumePredictor(
            [segmenter],
            Path(folder),
            batch_size=flags.batch_size,
            device=flags.device,
            amp_dtype=torch.bfloat16,
        )
        with torch.no_grad():
            segmenter.model(torch.rand(flags.batch_size, 1, size, size, device=flags.device))
        alone = peak_mib()
        started = time.perf_counter()
        predictor.run(Input("label", image))
        seconds = time.perf_counter() - started
    peak = peak_mib()
    volume = flags.size**2 * flags.slices * 4 / 2**20
    parts = predictor.clock.seconds
    print(f"{flags.arch} x {flags.width:g} U-Net, {flags.classes} classes, images of {size} px")
    print(f"volume {flags.size} x {flags.size} x {flags.slices}, {volume:.0f} MiB in float32")
    for name, spent in parts.items():
        print(f"  {name:10} {spent:9.2f} s {spent / seconds:7.1%}")
    rest = seconds - sum(parts.values())
    print(f"  {'rest':10} {rest:9.2f} s {rest / seconds:7.1%}")
    print(f"  {'total':10} {seconds:9.2f} s, {flags.slices / seconds:.2f} slices/s")
    print(
        f"peak: {before:.0f} MiB before, {alone:.0f} with the model alone, {peak:.0f} in all: "
        f"{(peak - alone) / volume:.2f} volumes in float32 beyond the model"
    )
    if flags.json:
        figures = {
            "seconds": seconds,
            "parts": parts,
            "inside_model": parts[INSIDE] / seconds,
            "slices_per_second": flags.slices / seconds,
            "peak_mib": {"before": before, "model": alone, "all": peak},
            "volume_mib": volume,
        }
        asked = {name: str(value) for name, value in vars(flags).items() if name != "json"}
        write_json(flags.json, {"environment": environment, "flags": asked} | figures)
    return 0


def random_segmenter(flags: argparse.Namespace) -> Segmenter:
    """A U-Net as `medmoco segment` builds it for images of this size."""
    stride = unet_stride(flags.image_size)
    model = UNet(Encoder(flags.arch, flags.width, stride), flags.classes).eval()
    names = ("background", *(f"organ {number}" for number in range(1, flags.classes)))
    grid = PixelGrid(flags.image_size, SPACING[0] * flags.size / flags.image_size)
    if flags.image_size < flags.size and flags.windows:
        grid = PixelGrid(flags.image_size, SPACING[0])
    values = tuple(range(flags.classes))
    return Segmenter(model, "unet", names, values, grid, CacheSettings("ct", 2))


def write_volume(path: Path, size: int, slices: int) -> Path:
    """Noise around soft tissue in air, in the stored type and order of many scanners.

    A slice at a time: the peak of the memory is to be that of the prediction.
    """
    random = np.random.default_rng(0)
    across = np.linspace(-1, 1, size, dtype=np.float32)
    body = np.hypot(across[:, None], across) < 0.8
    header = Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((size, size, slices))
    header.set_sform(np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1]), 1)
    header.set_slope_inter(1, -1024)
    header["magic"], header["vox_offset"] = b"n+1", 352
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + bytes(4))  # no extensions
        for _ in range(slices):
            noise = random.normal(0, 20, (size, size))
            plane = np.where(body, 1064, 24) + noise
            file.write(plane.astype(header.get_data_dtype()).tobytes(order="F"))
    return path


def peak_mib() -> float:
    """The most memory that the process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Exits with status 2 where flags make no sense."""
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--size", type=int, default=512, help="pixels of a slice's side; default: 512")
    add("--slices", type=int, default=300, help="of the volume; default: 300")
    add("--classes", type=int, default=14, help="with the background; default: 14, as BTCV")
    add("--arch", choices=ARCHITECTURES, default="resnet18", help="default: resnet18")
    add("--width", type=float, default=1.0, help="scales the encoder's channels; default: 1")
    add("--image-size", type=int, help="of the model's images; default: --size")
    add("--windows", action="store_true", help="smaller images are windows, not resampled slices")
    add("--batch-size", type=int, default=1, help="slices at once; default: 1")
    add("--device", help="cpu, cuda, cuda:1; default: cuda if there is a GPU")
    add("--json", type=Path, metavar="FILE", help="write figures and environment")
    flags = parser.parse_args(argv)
    flags.device = chosen_device(parser, flags.device)
    check_files(parser, json=flags.json)
    flags.image_size = flags.image_size or flags.size
    for name, least in (("size", 16), ("slices", 2), ("classes", 2), ("batch_size", 1)):
        if getattr(flags, name) < least:
            flag = name.replace("_", "-")
            parser.error(f"--{flag}: expected at least {least}, got {getattr(flags, name)}")
    return flags


if __name__ == "__main__":
    sys.exit(main())
