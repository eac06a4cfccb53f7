"""The ablation's controls: pixels, the atlas, whitening afterwards, a supervised encoder."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import ablation_controls as controls
from medmoco.data.slices import SliceDataset
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


def test_the_atlas_knows_where_organs_are_and_reads_no_pixel(segmentation, monkeypatch):
    monkeypatch.delattr(type(segmentation.cache), "images")
    result = controls.blind_atlas(segmentation)
    assert result["dice_per_volume"].keys() == set(segmentation.split.test)
    means = [dice for dice in result["dice_per_class"].values() if dice is not None]
    assert max(means) > 0.5  # the liver lies at one place in all phantoms
    assert result["weight_decay"] is None


def test_features_whitened_afterwards_are_white_where_there_is_an_image(segmentation):
    torch.manual_seed(0)
    encoder = Encoder("resnet18", 0.125)
    before = _mean_correlation(encoder, segmentation)
    whitened = controls.whiten_afterwards(segmentation, encoder)
    assert _mean_correlation(whitened, segmentation) < 0.1 * before
    assert whitened.channels == encoder.channels


def _mean_correlation(encoder, segmentation):
    """Over the cells of the pretraining slices' content, at the stride of the linear decoder."""
    encoder.eval()
    encoder.set_output_stride(4)
    slices = segmentation.cache.indices_of(segmentation.split.pretrain)
    dataset = SliceDataset(segmentation.cache, slices, segmentation.grid)
    cells = []
    for item in (dataset[i] for i in range(len(dataset))):
        rows, columns = ((32 - item["extent"]) / 2).tolist()
        centres = torch.arange(8) * 4 + 2.5
        inside = (
            ((centres > rows) & (centres < 32 - rows))[:, None]
            & ((centres > columns) & (centres < 32 - columns))[None]
        )  # fmt: skip
        with torch.no_grad():
            cells.append(encoder(item["image"][None])[0].movedim(0, -1)[inside])
    correlation = np.corrcoef(torch.cat(cells).double().numpy().T)
    return np.abs(correlation[~np.eye(len(correlation), dtype=bool)]).mean()


def test_the_supervised_encoder_learns_from_the_labels_of_all_pretraining_volumes(
    segmentation, monkeypatch
):
    used = []

    def finetune(segmenter, dataset, *arguments, **flags):
        used.extend(dataset[i]["label"] for i in range(len(dataset)))
        return train(segmenter, dataset, *arguments, **flags)

    train = controls.finetune
    monkeypatch.setattr(controls, "finetune", finetune)
    encoder = controls.supervised_encoder(segmentation, steps=1)
    torch.manual_seed(segmentation.config.seed)
    fresh = Encoder("resnet18", 0.125)
    assert not torch.equal(encoder.conv1.weight, fresh.conv1.weight)
    cache = segmentation.cache
    assert len(used) == len(cache.indices_of(segmentation.split.pretrain)) > 0
    assert any((label > 0).any() for label in used)
