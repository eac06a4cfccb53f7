"""The benchmark of prediction at small sizes: its figures add up."""

import json

import numpy as np
import pytest

import bench_predict
from medmoco.data.volumes import read_volume

SMALL = ["--size", "32", "--slices", "3", "--width", "0.125", "--classes", "3", "--device", "cpu"]


@pytest.mark.parametrize(
    "images", [[], ["--image-size", "16"], ["--image-size", "16", "--windows"]]
)
def test_parts_of_the_time_are_told_and_add_up(tmp_path, capsys, images):
    assert bench_predict.main([*SMALL, *images, "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["parts"]) == {"read", "to images", "model", "to slices", "write"}
    assert sum(figures["parts"].values()) <= figures["seconds"]
    assert figures["inside_model"] == figures["parts"]["model"] / figures["seconds"]
    peaks = figures["peak_mib"]
    assert peaks["before"] <= peaks["model"] <= peaks["all"]
    assert "slices/s" in capsys.readouterr().out


def test_volume_is_a_ct_in_air(tmp_path):
    volume = read_volume(bench_predict.write_volume(tmp_path / "ct.nii.gz", 32, 4))
    assert volume.voxels.shape == (32, 32, 4)
    np.testing.assert_allclose(volume.spacing, bench_predict.SPACING, rtol=1e-6)
    assert (
        abs(volume.voxels[16, 16].mean() - 40) < 30 and abs(volume.voxels[0, 0] + 1000).max() < 99
    )


def test_senseless_flags_are_named(capsys):
    with pytest.raises(SystemExit) as ended:
        bench_predict.main(["--slices", "1"])
    assert ended.value.code == 2
    assert "--slices: expected at least 2, got 1" in capsys.readouterr().err
