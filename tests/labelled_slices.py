"""Labelled slices that a small network learns in a few steps."""

import torch


class Slices(torch.utils.data.Dataset):
    """Noise with a dark square of class 1 and, in its corner, a bright dot of class 2."""

    def __init__(self, count=8, size=32):
        random = torch.Generator().manual_seed(count)
        self.image = 0.5 + 0.1 * torch.rand(count, 1, size, size, generator=random)
        self.label = torch.zeros(count, size, size, dtype=torch.int64)
        self.label[:, 8:20, 8:20] = 1
        self.label[:, 8:10, 8:10] = 2
        self.image[:, 0, 8:20, 8:20] -= 0.4
        self.image[:, 0, 8:10, 8:10] += 0.8
        self.shown = torch.ones(count, 3, dtype=torch.bool)

    def __len__(self):
        return len(self.image)

    def __getitem__(self, item):
        return {"image": self.image[item], "label": self.label[item]}

    def pixels(self):
        return self.label.flatten().bincount()
