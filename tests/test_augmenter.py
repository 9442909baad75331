"""``resfast.Augment`` and ``resfast.DeviceLoader`` in loops that are not ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

import resfast
from resfast.data import augment as policies
from resfast.data.resident import ResidentLoader
from resfast.errors import ResfastError

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def images(count: int = 6, height: int = 12, width: int = 10, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, height, width, channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def plain(x: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return ((x.float() / 255 - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize("policy", ["standard", "strong", "report-001"])
def test_every_form_of_the_same_images_gives_the_same(policy: str):
    x, labels = images(), torch.tensor([0, 1, 2, 0, 1, 2])
    keys = {"epoch": 3, "indices": torch.arange(100, 106)}
    augment = resfast.Augment(policy, mean=MEAN, std=STD, classes=3, seed=5)
    expected, targets = augment(x, labels, **keys)
    assert expected.shape == (6, 3, 12, 10)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    for other in (
        x.permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2).contiguous(),
        x.float() / 255,
        (x.double() / 255).permute(0, 3, 1, 2),
        x.flip(0).flip(0),
    ):
        found, weights = augment(other, labels, **keys)
        assert torch.equal(found, expected)
        assert torch.equal(weights, targets)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_eval_mode_only_normalizes(channels: int):
    x = images(channels=channels)
    augment = resfast.Augment("standard", mean=0.5, std=0.25).eval()
    expected = ((x.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)
    assert torch.allclose(augment(x), expected, atol=1e-5)
    assert torch.equal(augment(x), augment(x))
    labels = torch.arange(6)
    assert torch.equal(resfast.Augment("strong").eval()(x, labels)[1], labels)


def test_values_are_those_of_the_trainers_loader():
    x, labels = images(height=12, width=12), torch.tensor([0, 1, 2, 0, 1, 2])
    policy = policies.parse_augment("standard,cutout=4")
    loader = ResidentLoader(
        x,
        labels,
        torch.tensor(MEAN),
        torch.tensor(STD),
        batch_size=3,
        augment=policy,
        classes=3,
        seed=7,
    )
    augment = resfast.Augment(policy, mean=MEAN, std=STD, seed=7)
    ours = resfast.DeviceLoader((x, labels), 3, augment)
    for epoch in range(3):
        for batch, (found, targets) in zip(loader.epoch(epoch), ours, strict=True):
            assert torch.equal(found, batch.images)
            assert torch.equal(targets, batch.labels)


def test_calls_differ_and_a_seed_or_generator_repeats_them():
    x = images(64, 12, 12)

    def calls(**options: object) -> list[Tensor]:
        augment = resfast.Augment("crop=3,flip=random", **options)
        return [augment(x) for _ in range(3)]

    first = calls()
    assert not torch.equal(first[0], first[1])
    assert all(map(torch.equal, first, calls()))
    assert not torch.equal(first[0], calls(seed=1)[0])
    drawn = calls(generator=torch.Generator().manual_seed(3))
    assert not torch.equal(drawn[0], drawn[1])
    assert all(map(torch.equal, drawn, calls(generator=torch.Generator().manual_seed(3))))
    shifted = {
        bytes(image.numpy().tobytes())
        for image in resfast.Augment("crop=3")(x[:1].expand(64, -1, -1, -1))
    }
    assert len(shifted) > 20  # each image on its own


def test_pixels_are_those_of_torchvision_for_the_same_parameters():
    x = images(40, 16, 16)
    augment = resfast.Augment("crop=2,padding=zero,flip=random", mean=MEAN, std=STD)
    found = augment(x, epoch=0, indices=torch.arange(40))
    params = policies.sample(
        augment.policy, torch.arange(40), size=(16, 16), channels=3, seed=0, epoch=0
    )
    assert params.shift is not None
    assert params.flip is not None
    for row in range(40):
        image = v2.functional.pad(x[row].permute(2, 0, 1), [2])
        top, left = (params.shift[row] + 2).tolist()
        image = v2.functional.crop(image, top, left, 16, 16)
        if params.flip[row]:
            image = v2.functional.horizontal_flip(image)
        expected = v2.functional.normalize(v2.functional.to_dtype(image, scale=True), MEAN, STD)
        assert torch.allclose(found[row], expected, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixup=1", "cutmix=1", "strong"])
def test_mixed_labels_are_the_shares_of_the_images(policy: str):
    x = torch.zeros(8, 16, 16, 1, dtype=torch.uint8)
    x[::2] = 255  # and neighbours are mixed
    labels = torch.tensor([0, 1] * 4)
    policy = (
        f"{policy},crop=0,cutout=0,rotate=0,brightness=0,contrast=0"
        if policy == "strong"
        else policy
    )
    augment = resfast.Augment(policy, classes=2)
    for _ in range(5):
        mixed, weights = augment(x, labels)
        assert torch.allclose(weights.sum(1), torch.ones(8))
        assert torch.allclose(mixed.mean((1, 2, 3)), weights[:, 0], atol=1e-3)


def test_it_compiles_without_a_graph_break():
    x, labels = images(), torch.tensor([0, 1, 2, 0, 1, 2])
    torch._dynamo.reset()
    compiled = torch.compile(resfast.Augment("strong", classes=3), fullgraph=True, backend="eager")
    eager = resfast.Augment("strong", classes=3)
    for _ in range(10):
        found, expected = compiled(x, labels), eager(x, labels)
        assert torch.allclose(found[0], expected[0], atol=1e-4)
        assert torch.allclose(found[1], expected[1])


X, Y = images(), torch.tensor([0, 1, 2, 0, 1, 2])
augment, loader = resfast.Augment, resfast.DeviceLoader
WRONG = {
    "policy": (
        lambda: augment("standart"),
        "'standart' is not a policy; .*mean 'standard'",
    ),
    "crop": (lambda: augment("crop=12")(X), "^crop=12 does not fit images of 12x10"),
    "mean of pixels": (
        lambda: augment(mean=[125, 120, 110]),
        r"mean is \[125.*pixel / 255",
    ),
    "std": (lambda: augment(std=0), r"std is \[0.0\]; .*above 0"),
    "channels": (
        lambda: augment(mean=[0.1] * 3, std=[0.1] * 2),
        "and std 2",
    ),
    "other channels": (
        lambda: augment(mean=MEAN)(X[..., :2]),
        "and the images 2",
    ),
    "dtype": (lambda: augment(dtype=torch.float64), "dtype is torch.float64"),
    "layout": (lambda: augment(layout="CHW"), "layout is 'CHW'"),
    "images of int64": (
        lambda: augment()(X.long()),
        "images are torch.int64; expected uint8",
    ),
    "normalized images": (
        lambda: augment()(X.float()),
        "torch.float32 from 0 to 255",
    ),
    "NaN": (lambda: augment()(X.float() * torch.nan), "from nan to nan"),
    "one image": (lambda: augment()(X[0]), r"torch.uint8 \[12, 10, 3\]"),
    "no axis": (
        lambda: augment()(images(2, 3, 9, 3)),
        "which axis has the channels",
    ),
    "too many": (
        lambda: augment(layout="NHWC")(images(2, 9, 9, 5)),
        "with 5 channels in NHWC",
    ),
    "labels": (lambda: augment(classes=2)(X, Y), "labels are from 0 to 2; expected 0 to 1"),
    "labels of floats": (lambda: augment()(X, Y.float()), "labels are torch.float32"),
    "few labels": (lambda: augment()(X, Y[:3]), r"int64 \[3\]; expected int64 \[6\]"),
    "no labels": (lambda: augment("mixup=1", classes=3)(X), "mixes images, .*pass labels"),
    "no classes": (lambda: augment("mixup=1")(X, Y), "pass classes=N"),
    "half of the keys": (
        lambda: augment()(X, epoch=1),
        "epoch and indices belong together",
    ),
    "epoch": (lambda: augment()(X, epoch=-1, indices=Y), "epoch is -1"),
    "indices": (
        lambda: augment()(X, epoch=1, indices=Y[:2]),
        r"indices are .*\[2\]",
    ),
    "batch size": (lambda: loader((X, Y), 7), "batch_size is 7; expected 1 to 6"),
    "no batch size": (lambda: loader((X, Y)), "batch_size is None"),
    "rank": (
        lambda: loader((X, Y), 2, rank=2, world=2),
        "rank is 2; expected 0 to 1",
    ),
    "source": (lambda: loader(3, 2), "source is a int; expected a pair of tensors"),
    "three tensors": (lambda: loader((X, Y, Y), 2), "source is a tuple of 3"),
    "float images": (lambda: loader((X.float(), Y), 2), "images are torch.float32"),
    "counts": (lambda: loader((X, Y[:2]), 2), r"labels are torch.int64 \[2\]"),
    "batches of its own": (lambda: loader(iter([]), 2), "yields batches of its own"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_in_their_own_words(name: str):
    call, message = WRONG[name]
    with pytest.raises(ResfastError, match=message) as error:
        call()
    assert "--" not in str(error.value)


# -- loaders ---------------------------------------------------------------------------------------


class Pairs(torch.utils.data.Dataset):
    """Images of one kind with labels."""

    def __init__(self, kind: str, count: int = 6) -> None:
        self.kind, self.count = kind, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple:
        image = X[row]
        if self.kind == "array":
            return image.numpy(), np.int64(Y[row])
        if self.kind == "CHW":
            return image.permute(2, 0, 1), int(Y[row])
        if self.kind == "PIL":
            return v2.functional.to_pil_image(image.permute(2, 0, 1)), int(Y[row])
        return image.float(), int(Y[row])


@pytest.mark.parametrize("kind", ["array", "CHW", "PIL"])
def test_data_sets_of_torch_are_read_into_memory(kind: str):
    loader = resfast.DeviceLoader(Pairs(kind), 4, "none", shuffle=False, drop_last=False)
    batches = list(loader)
    assert len(loader) == 2
    assert [len(labels) for _, labels in batches] == [4, 2]
    found = torch.cat([batch for batch, _ in batches])
    assert torch.allclose(found, X.permute(0, 3, 1, 2) / 255, atol=1e-6)
    assert torch.cat([labels for _, labels in batches]).tolist() == Y.tolist()


def test_data_sets_that_are_no_images_are_refused():
    with pytest.raises(ResfastError, match=r"image 0 of Pairs is torch\.float32"):
        resfast.DeviceLoader(Pairs("float"), 2)
    with pytest.raises(ResfastError, match="Pairs is empty"):
        resfast.DeviceLoader(Pairs("array", 0), 2)
    with pytest.raises(ResfastError, match="item 0 of range is not an image and a label"):
        resfast.DeviceLoader(range(3), 2)


def test_epochs_follow_each_other_and_can_be_set():
    x = images(32, 12, 12)
    x[:, 0, 0, 0] = torch.arange(32)  # tells the images apart
    make = lambda: resfast.DeviceLoader((x, torch.arange(32)), 8, "crop=2", drop_last=False)  # noqa: E731
    loader, again = make(), make()
    first, second = list(loader), list(loader)
    again.set_epoch(1)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(second, again, strict=True))
    orders = [torch.cat([labels for _, labels in epoch]).tolist() for epoch in (first, second)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(32))
    with pytest.raises(ResfastError, match="epoch is -1"):
        loader.set_epoch(-1)


def test_ranks_share_the_batches_of_one():
    x, labels = images(33, 12, 12), torch.arange(33)
    whole = resfast.DeviceLoader((x, labels), 8, "standard", drop_last=False)
    parts = [
        resfast.DeviceLoader((x, labels), 4, "standard", drop_last=False, rank=rank, world=2)
        for rank in range(2)
    ]
    assert len(whole) == 5
    assert [len(part) for part in parts] == [4, 4]  # one image is not enough for two ranks
    for (batch, targets), *shares in zip(list(whole)[:4], *parts, strict=True):
        assert torch.equal(torch.cat([share[0] for share in shares]), batch)
        assert torch.equal(torch.cat([share[1] for share in shares]), targets)


def test_batches_of_another_loader_are_augmented():
    other = torch.utils.data.DataLoader(Pairs("CHW"), batch_size=3)
    loader = resfast.DeviceLoader(other, augment="none")
    assert len(loader) == 2
    found = torch.cat([batch for batch, _ in loader])
    assert torch.allclose(found, X.permute(0, 3, 1, 2) / 255, atol=1e-6)


def test_batches_of_dali_are_augmented():
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    @pipeline_def(batch_size=3, num_threads=1, device_id=None)
    def graph():
        source = lambda: (X[:3].numpy(), Y[:3, None].numpy())  # noqa: E731
        return tuple(fn.external_source(source, num_outputs=2, batch=True))

    iterator = DALIGenericIterator([graph()], ["data", "label"], size=3)
    [(found, labels)] = list(resfast.DeviceLoader(iterator, augment="none"))
    assert torch.allclose(found, X[:3].permute(0, 3, 1, 2) / 255, atol=1e-6)
    assert labels.tolist() == Y[:3].tolist()


def test_the_benchmark_has_the_values_of_the_policies():
    from benchmarks import test_augmenter as bench

    standard = {"crop": bench.CROP, "cutout": bench.CUTOUT}
    color = dict.fromkeys(("brightness", "contrast", "saturation"), bench.COLOR)
    strong = standard | color
    strong |= {"rotate": bench.ANGLE, "mixup": bench.MIXUP, "cutmix": bench.CUTMIX}
    for name, values in (("standard", standard), ("strong", strong)):
        assert values == {
            key: value
            for key, value in vars(policies.POLICIES[name]).items()
            if value != getattr(policies.POLICIES["none"], key) and key != "flip"
        }
