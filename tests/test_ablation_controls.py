"""The ablation's controls: pixels, the atlas, whitening afterwards, a supervised encoder."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import ablation_controls as controls
from medmoco.data.splits import split_task, write_split
from medmoco.data.task import read_task
from medmoco.models.encoder import Encoder
from medmoco.segment import SegmentConfig, prepare


@pytest.fixture(scope="module")
def segmentation(tiny_task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls")
    write_split(folder / "split.json", split_task(read_task(tiny_task)))
    flags = {"arch": "resnet18", "width": 0.125, "image_size": 32, "device": "cpu"}
    config = SegmentConfig(
        task=tiny_task, split=folder / "split.json", cache=folder / "cache", **flags
    )
    return prepare(config)


def test_patches_hold_the_pixels_around_their_cell():
    encoder = controls.IntensityPatches()
    encoder.set_output_stride(4)
    image = torch.rand(2, 1, 32, 40)
    features = encoder(image)
    assert features.shape == (2, 256, 8, 10) and encoder.channels[-1] == 256
    inside = features[1, :, 3, 4].reshape(16, 16)  # rows 12 to 15 of the image, columns 16 to 19
    torch.testing.assert_close(inside, image[1, 0, 6:22, 10:26])
    # On a ramp their mean tells where they are centred: as resizing takes the cells of a map.
    ramp = torch.arange(40.0).expand(1, 1, 32, 40)
    middle = encoder(ramp).mean(1)[0, 4, 2:8]
    resized = functional.interpolate(ramp, scale_factor=0.25, mode="bilinear")[0, 0, 4, 2:8]
    torch.testing.assert_close(middle, resized)


def test_the_atlas_knows_where_organs_are_and_reads_no_pixel(segmentation):
    result = controls.blind_atlas(segmentation)
    assert result["dice_per_volume"].keys() == set(segmentation.split.test)
    means = [dice for dice in result["dice_per_class"].values() if dice is not None]
    assert max(means) > 0.5  # the liver lies at one place in all phantoms
    assert result["weight_decay"] is None


def test_features_whitened_afterwards_are_white(segmentation):
    torch.manual_seed(0)
    encoder = Encoder("resnet18", 0.125)
    whitened = controls.whiten_afterwards(segmentation, encoder)
    slices = segmentation.cache.indices_of(segmentation.split.pretrain)
    images = torch.stack([segmentation.dataset[i]["image"] for i in range(len(slices))])
    with torch.no_grad():
        cells = whitened(images).movedim(1, -1).flatten(0, 2).double().numpy()
    correlation = np.corrcoef(cells.T)
    off_diagonal = correlation[~np.eye(len(correlation), dtype=bool)]
    before = np.corrcoef(_cells(encoder, images).T)
    assert np.abs(off_diagonal).mean() < 0.1 * np.abs(before - np.eye(len(before))).mean()
    assert whitened.channels == encoder.channels


def _cells(encoder, images):
    with torch.no_grad():
        return encoder(images).movedim(1, -1).flatten(0, 2).double().numpy()


def test_the_supervised_encoder_has_learned(segmentation):
    encoder = controls.supervised_encoder(segmentation, steps=1)
    torch.manual_seed(segmentation.config.seed)
    fresh = Encoder("resnet18", 0.125)
    assert not torch.equal(encoder.conv1.weight, fresh.conv1.weight)
