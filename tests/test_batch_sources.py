"""What every source of training batches does, whether its images are resident or streamed."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from resfast.data import batches as feed
from resfast.data.augment import Augment, order, parse_augment, smaller
from resfast.data.batch import Batch, BatchSource
from resfast.data.dataset import Files, Shards
from resfast.data.device_batches import DeviceBatches
from resfast.data.shards import write_shards
from resfast.errors import ResfastError

COUNT, CLASSES, SIZE, BATCH, SEED = 23, 5, 16, 6, 3
STEPS = COUNT // BATCH
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
IN_ORDER = ("resident", "arrays", "files")
"""Kinds whose order is the function of seed and epoch that resident images have."""
STREAMED = ("arrays", "files", "shards")


def pictures() -> Tensor:
    """23 images, each filled with ten times its own number."""
    values = 10 * torch.arange(COUNT, dtype=torch.uint8)
    return values[:, None, None, None].expand(-1, SIZE, SIZE, 3).contiguous()


LABELS = torch.arange(COUNT) % CLASSES


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [str(folder / f"{number:02d}.png") for number in range(COUNT)]
    for path, image in zip(paths, pictures().numpy(), strict=True):
        Image.fromarray(image).save(path)
    return Files(tuple(paths), LABELS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    tree, folder = (tmp_path_factory.mktemp(name) for name in ("tree", "shards"))
    for split in ("train", "test"):
        for number, image in enumerate(pictures().numpy()):
            path = tree / split / str(int(LABELS[number])) / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    write_shards(tree, folder, images_per_shard=9, report=lambda line: None)
    return Shards(tuple(str(path) for path in sorted(folder.glob("train-*.tar"))), COUNT)


def make(kind: str, request: pytest.FixtureRequest, **options: object) -> BatchSource:
    """The training batches of one kind, as a training opens them."""
    source: feed.Source = pictures(), LABELS
    if kind != "resident":
        pytest.importorskip("nvidia.dali")
    if kind in ("files", "shards"):
        source = request.getfixturevalue(kind)
    values = {
        "loader": "resident" if kind == "resident" else "dali",
        "image_size": SIZE,
        "batch_size": BATCH,
        "augment": Augment(),
        "classes": CLASSES,
        "seed": SEED,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "resize_by": "resize",
        "prefetch": 2,
        "threads": 1,
        **options,
    }
    return feed.training_batches(source, MEAN, STD, **values)


def whole_epoch(batches: BatchSource, epoch: int, first: int = 0) -> list[Batch]:
    batches.begin(epoch, first=first)
    return [batches.next(BATCH, SIZE) for _ in range(first // BATCH, STEPS)]


def numbers(images: Tensor) -> Tensor:
    """Which image each of an unaugmented batch is."""
    value = images[:, 0, 0, 0].float() * STD[0] + MEAN[0]
    return (value * 25.5).round().long()


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for batch, other in zip(found, expected, strict=True):
        for name, value in batch._asdict().items():
            assert torch.equal(value, getattr(other, name)), name


@pytest.fixture(params=["resident", *STREAMED])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_has_the_documented_shapes_and_types(
    kind: str, dtype: torch.dtype, request: pytest.FixtureRequest
):
    batches = make(kind, request, dtype=dtype)
    assert (batches.count, len(batches)) == (COUNT, STEPS)
    images, labels, indices = whole_epoch(batches, 0)[-1]
    assert (images.shape, images.dtype) == ((BATCH, 3, SIZE, SIZE), dtype)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (labels.shape, labels.dtype) == ((BATCH,), torch.int64)
    assert (indices.shape, indices.dtype) == ((BATCH,), torch.int64)


def test_mixed_batches_have_the_parts_of_their_classes(kind: str, request: pytest.FixtureRequest):
    batches = make(kind, request, augment=Augment(mixup=1.0))
    for batch in whole_epoch(batches, 0):
        assert (batch.labels.shape, batch.labels.dtype) == ((BATCH, CLASSES), torch.float32)
        torch.testing.assert_close(batch.labels.sum(1), torch.ones(BATCH))


def test_labels_and_indices_are_those_of_the_images(kind: str, request: pytest.FixtureRequest):
    batches = make(kind, request)
    index_of: dict[int, int] = {}
    for epoch in range(3):
        seen = []
        for images, labels, indices in whole_epoch(batches, epoch):
            shown = numbers(images)
            assert torch.equal(labels, LABELS[shown])
            if kind in IN_ORDER:
                assert torch.equal(indices, shown)
            for number, index in zip(shown.tolist(), indices.tolist(), strict=True):
                assert index_of.setdefault(number, index) == index
            seen += shown.tolist()
        assert len(set(seen)) == len(seen) == STEPS * BATCH
    assert len(set(index_of.values())) == len(index_of)


def test_each_epoch_has_an_order_of_its_own(kind: str, request: pytest.FixtureRequest):
    batches = make(kind, request)
    found = [torch.cat([b.indices for b in whole_epoch(batches, epoch)]) for epoch in range(3)]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    if kind in IN_ORDER:
        for epoch, indices in enumerate(found):
            expected = order(COUNT, seed=SEED, epoch=epoch, device="cpu")
            assert torch.equal(indices, expected[: STEPS * BATCH])


@pytest.mark.parametrize("augment", ["none", "strong,crop=3,mixup=0.4"])
@pytest.mark.parametrize("step", [0, 1, STEPS - 1])
def test_a_saved_source_goes_on_with_the_same_bits(
    kind: str, augment: str, step: int, request: pytest.FixtureRequest
):
    policy = parse_augment(augment)
    whole = make(kind, request, augment=policy)
    expected = [whole_epoch(whole, epoch) for epoch in range(3)]
    stopped = make(kind, request, augment=policy)
    whole_epoch(stopped, 0)
    stopped.begin(1)
    for _ in range(step):
        stopped.next(BATCH, SIZE)
    state = stopped.state_dict()
    resumed = make(kind, request, augment=policy)
    resumed.load_state_dict(state)
    assert_same(whole_epoch(resumed, 1, step * BATCH), expected[1][step:])
    assert_same(whole_epoch(resumed, 2), expected[2])
    # The same bits come from a source that knows the place alone.
    assert_same(
        whole_epoch(make(kind, request, augment=policy), 1, step * BATCH), expected[1][step:]
    )


def test_an_epoch_left_in_the_middle_changes_nothing(kind: str, request: pytest.FixtureRequest):
    expected = whole_epoch(make(kind, request), 0)
    batches = make(kind, request)
    batches.begin(0)
    batches.next(BATCH, SIZE)
    assert_same(whole_epoch(batches, 0), expected)


@pytest.mark.parametrize("by", ["resize", "crop"])
def test_smaller_batches_are_made_of_the_same_images(
    kind: str, by: str, request: pytest.FixtureRequest
):
    augment = parse_augment("crop=3,flip=alternating")
    whole = make(kind, request, augment=augment)
    batches = make(kind, request, augment=augment, resize_by=by)
    for epoch in range(2):
        expected = whole_epoch(whole, epoch)
        batches.begin(epoch)
        for step, batch in enumerate(expected):
            found = batches.next(BATCH, 10)
            assert torch.equal(found.indices, batch.indices)
            images = smaller(batch.images, 10, by=by, seed=SEED, epoch=epoch, first=step * BATCH)
            assert torch.equal(found.images, images)


@pytest.mark.parametrize("augment", ["none", "strong,crop=3,mixup=0.4"])
def test_the_incomplete_last_batch_has_the_rest_of_the_images(
    kind: str, augment: str, request: pytest.FixtureRequest
):
    policy = parse_augment(augment)
    without = make(kind, request, augment=policy)
    batches = make(kind, request, augment=policy, drop_last=False)
    rest = COUNT - STEPS * BATCH
    assert (len(without), len(batches)) == (STEPS, STEPS + 1)
    for epoch in range(2):
        found = whole_epoch(batches, epoch)
        last = batches.next(rest, SIZE)
        assert_same(found, whole_epoch(without, epoch))
        assert [len(value) for value in last] == [rest] * 3
        seen = torch.cat([*(batch.indices for batch in found), last.indices])
        assert len(seen.unique()) == COUNT
        if augment == "none":
            assert torch.equal(last.labels, LABELS[numbers(last.images)])
    state = batches.state_dict()  # a run may be stopped before the last batch
    batches.begin(1, first=STEPS * BATCH)
    again = make(kind, request, augment=policy, drop_last=False)
    again.load_state_dict(state)
    again.begin(1, first=STEPS * BATCH)
    assert_same([again.next(rest, SIZE)], [last])


@pytest.mark.parametrize("name", STREAMED)
def test_an_incomplete_last_batch_that_is_read_ahead_cannot_be_changed(
    name: str, request: pytest.FixtureRequest
):
    batches = make(name, request, drop_last=False)
    batches.begin(0, first=STEPS * BATCH)
    with pytest.raises(ValueError, match="images is 6; expected 5"):
        batches.next(BATCH, SIZE)


@pytest.mark.parametrize("name", STREAMED)
def test_what_is_read_ahead_cannot_be_changed(name: str, request: pytest.FixtureRequest):
    batches = make(name, request)
    with pytest.raises(ValueError, match="order is given"):
        batches.begin(0, order=torch.arange(BATCH))
    with pytest.raises(ValueError, match="first is 4; expected a multiple of the batch size 6"):
        batches.begin(0, first=4)
    with pytest.raises(RuntimeError, match="no more batches"):
        batches.next(BATCH, SIZE)
    batches.begin(0, first=BATCH * (STEPS - 1))
    with pytest.raises(ValueError, match="images is 5; expected 6"):
        batches.next(5, SIZE)
    batches.next(BATCH, SIZE)
    with pytest.raises(RuntimeError, match="no more batches"):
        batches.next(BATCH, SIZE)


def test_only_what_captured_steps_know_is_used_again(kind: str, request: pytest.FixtureRequest):
    first = make(kind, request)
    before = [tensor.data_ptr() for tensor in first.tensors]
    second = make(kind, request, seed=SEED + 1, reuse=first)
    assert (second is first) == first.capturable == isinstance(first, DeviceBatches)
    assert [tensor.data_ptr() for tensor in first.tensors] == before
    assert_same(whole_epoch(second, 1), whole_epoch(make(kind, request, seed=SEED + 1), 1))


def test_shards_of_another_run_are_refused(request: pytest.FixtureRequest):
    batches = make("shards", request)
    batches.begin(0)
    batches.next(BATCH, SIZE)
    with pytest.raises(ResfastError, match="is of seed 3, but this run has seed 4"):
        make("shards", request, seed=4).load_state_dict(batches.state_dict())


@pytest.mark.parametrize("kind", ["resident", "files"])
def test_label_noise_replaces_a_fraction_of_the_labels_by_other_classes(kind: str, files: Files):
    images = pictures().repeat(40, 1, 1, 1)
    labels = LABELS.repeat(40)
    paths = files.paths * 40
    source = (images, labels) if kind == "resident" else Files(paths, labels)

    def noisy(fraction: float, seed: int = 0) -> Tensor:
        made = feed.with_label_noise(source, fraction, CLASSES, seed)
        assert (made[0] is images) if isinstance(made, tuple) else (made.paths == paths)
        return made[1] if isinstance(made, tuple) else made.labels

    before = labels.clone()
    changed = noisy(0.2) != labels
    assert changed.sum() == int(0.2 * len(labels))  # every replaced label is another class
    assert torch.equal(labels, before)
    assert torch.equal(noisy(0.2), noisy(0.2))
    assert not torch.equal(noisy(0.2), noisy(0.2, seed=1))
    assert torch.equal(noisy(0.0), labels)
    shifts = (noisy(0.9) - labels)[noisy(0.9) != labels] % CLASSES
    counts = torch.bincount(shifts, minlength=CLASSES)
    assert counts[0] == 0
    assert counts[1:].min() > 0.8 * counts.sum() / (CLASSES - 1)


def test_labels_in_shards_cannot_be_noisy():
    with pytest.raises(ResfastError, match="--label-noise cannot change the labels in shards"):
        feed.with_label_noise(Shards(("a.tar",), 5), 0.1, CLASSES, 0)
