"""The handwritten digits of scikit-learn: a small data set that needs no download."""

from __future__ import annotations

import torch

from resfast.data.dataset import Dataset, Request, make_dataset
from resfast.data.resize import resize
from resfast.data.split import split_validation

TEST_FRACTION, SPLIT_SEED = 0.2, 0


def open_digits(request: Request) -> Dataset:
    """The 1,797 8x8 grey digits that come with scikit-learn, as RGB; 80 % train, 20 % test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).to(torch.float32) * (255 / 16)  # [N, 8, 8], 0 to 16
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    images = resize(grey[..., None], request.image_size).expand(-1, -1, -1, 3)
    train, test = split_validation(labels, TEST_FRACTION, SPLIT_SEED)
    tensors = {
        "train_images": images[train].contiguous(),
        "train_labels": labels[train],
        "test_images": images[test].contiguous(),
        "test_labels": labels[test],
    }
    return make_dataset("digits", tensors, tuple(str(name) for name in bunch.target_names))
