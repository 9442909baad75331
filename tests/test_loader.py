"""The resident loader, and the choice between it and a stream."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from resfast import runtime
from resfast.data import batches as feed
from resfast.data import image_folder
from resfast.data.augment import POLICIES, Augment, parse_augment
from resfast.data.dataset import Dataset, Files, Shards, Stream
from resfast.data.resident import ResidentLoader, resident_batches
from resfast.data.sources import load_dataset, open_data
from resfast.errors import ResfastError

COUNT, CLASSES = 23, 5
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


def make(**options: object) -> ResidentLoader:
    """23 images of 9x8 pixels, each filled with its own number, and labels from it."""
    images = torch.arange(COUNT, dtype=torch.uint8)[:, None, None, None]
    values = {"batch_size": 6, "augment": Augment(), "classes": CLASSES, **options}
    return ResidentLoader(
        images.expand(-1, 9, 8, 3).contiguous(), torch.arange(COUNT) % CLASSES, MEAN, STD, **values
    )


def numbers(batch: torch.Tensor) -> list[int]:
    """Which image each of an unaugmented batch is."""
    return (batch[:, 0, 0, 0] * STD[0] * 255 + MEAN[0] * 255).round().int().tolist()


def test_an_epoch_visits_each_image_at_most_once_with_its_label():
    loader = make()
    seen = []
    for images, labels, indices in loader.epoch(0):
        assert images.shape == (6, 3, 9, 8)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.tolist() == [n % CLASSES for n in numbers(images)]
        assert indices.tolist() == numbers(images)
        seen += numbers(images)
    assert len(loader) == 3
    assert len(set(seen)) == len(seen) == 18


def test_without_drop_last_an_epoch_is_exactly_the_data_set():
    loader = make(drop_last=False)
    batches = [numbers(batch.images) for batch in loader.epoch(0)]
    assert [len(batch) for batch in batches] == [6, 6, 6, 5] == [6] * (len(loader) - 1) + [5]
    assert sorted(n for batch in batches for n in batch) == list(range(COUNT))


def test_epochs_differ_and_seeds_differ_and_the_same_one_repeats():
    def first(seed: int, epoch: int) -> list[int]:
        return numbers(next(make(seed=seed).epoch(epoch)).images)

    assert first(0, 0) == first(0, 0)
    assert first(0, 0) != first(0, 1)
    assert first(0, 0) != first(1, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_is_a_function_of_seed_epoch_and_step(policy: str):
    loader = make(augment=parse_augment(policy) if policy == "none" else tamed(policy))
    whole = list(loader.epoch(3))
    again = list(make(augment=loader.augment).epoch(3, first_step=2))
    for batch, other in zip(whole[2:], again, strict=True):
        for name, value in batch._asdict().items():
            assert torch.equal(value, getattr(other, name)), name


def tamed(policy: str) -> Augment:
    """A named policy for images of 9x8 pixels."""
    return parse_augment(f"{policy},crop=3,cutout=2")


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_out_what_one_process_would_see(drop_last: bool):
    alone = make(batch_size=6, augment=tamed("standard"), drop_last=drop_last)
    ranks = [
        make(batch_size=3, augment=tamed("standard"), drop_last=drop_last, rank=rank, world=2)
        for rank in range(2)
    ]
    assert len(alone) == len(ranks[0]) == len(ranks[1])
    steps = zip(alone.epoch(1), *(rank.epoch(1) for rank in ranks), strict=True)
    for whole, *parts in steps:
        for name, value in whole._asdict().items():
            assert torch.equal(value, torch.cat([getattr(part, name) for part in parts])), name


def test_mixed_batches_carry_the_parts_of_their_classes():
    loader = make(augment=Augment(mixup=1.0))
    images, labels, _ = next(loader.epoch(0))
    assert labels.shape == (6, CLASSES)
    torch.testing.assert_close(labels.sum(1), torch.ones(6))
    # Plain images of the numbers a and b mixed by w have the value w a + (1 - w) b everywhere.
    value = images[:, 0, 0, 0] * STD[0] * 255 + MEAN[0] * 255
    order = stream_order(loader)
    from resfast.data.augment import sample_mix

    mix = sample_mix(loader.augment, order[:6], count=COUNT, size=(9, 8), seed=0, epoch=0)
    expected = mix.weight * order[:6] + (1 - mix.weight) * mix.partner
    torch.testing.assert_close(value, expected, atol=1e-3, rtol=0)
    own = torch.nn.functional.one_hot(order[:6] % CLASSES, CLASSES)
    other = torch.nn.functional.one_hot(mix.partner % CLASSES, CLASSES)
    weight = mix.weight[:, None]
    torch.testing.assert_close(labels, weight * own + (1 - weight) * other)


def stream_order(loader: ResidentLoader) -> torch.Tensor:
    from resfast.data.augment import order

    return order(loader.count, seed=loader.seed, epoch=0, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size 0 does not fit 23 training images"),
        ({"batch_size": 24}, "choose --batch-size between 1 and 23"),
        ({"batch_size": 12, "world": 2}, "choose --batch-size between 1 and 11"),
        ({"rank": 2, "world": 2}, "rank 2 is out of range: expected 0 to 1"),
        ({"augment": Augment(crop=8)}, "crop=8"),
        ({"augment": Augment(cutout=9)}, "cutout=9"),
    ],
)
def test_values_that_do_not_fit_are_refused(options: dict, message: str):
    with pytest.raises(ResfastError, match=message):
        make(**options)


def test_evaluation_batches_are_all_images_in_order_normalized():
    images = torch.randint(0, 256, (7, 4, 5, 3), dtype=torch.uint8)
    labels = torch.arange(7)
    batches = list(resident_batches(images, labels, MEAN, STD, batch_size=3))
    assert [len(batch) for batch, _ in batches] == [3, 3, 1]
    expected = (images / 255 - MEAN) / STD
    torch.testing.assert_close(
        torch.cat([batch for batch, _ in batches]).permute(0, 2, 3, 1), expected
    )
    assert torch.equal(torch.cat([part for _, part in batches]), labels)


# -- resident or streamed ------------------------------------------------------------------------


def test_auto_streams_what_does_not_fit_half_of_the_free_memory(
    image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    needed = 64 * 16 * 16 * 3
    opened, messages = [], []
    for free in (2 * needed, 2 * needed - 1):
        monkeypatch.setattr(image_folder, "free_memory", lambda device, free=free: free)
        opened.append(
            open_data(
                f"folder:{image_tree}", data_dir=tmp_path, image_size=16, report=messages.append
            )
        )
    assert isinstance(opened[0], Dataset)
    assert isinstance(opened[1], Stream)
    assert "more than half of the free memory: streaming it through DALI" in messages[-1]


def test_a_stream_lists_what_the_resident_data_set_holds(image_tree: Path, tmp_path: Path):
    where = {"data_dir": tmp_path, "image_size": 16}
    opened = open_data(f"folder:{image_tree}", loader="dali", **where)
    held = load_dataset(f"folder:{image_tree}", **where)
    assert (opened.classes, opened.image_size) == (held.classes, held.image_size)
    assert torch.equal(opened.train.labels, held.train_labels)
    assert torch.equal(opened.test.labels, held.test_labels)
    assert all(Path(path).is_file() for path in opened.train.paths + opened.test.paths)
    again = open_data(f"folder:{image_tree}", loader="dali", **where)
    assert again.digest == opened.digest != held.digest


def test_the_digest_of_a_stream_changes_with_its_files(image_tree: Path, tmp_path: Path):
    import shutil

    tree = tmp_path / "tree"
    shutil.copytree(image_tree, tree)

    def digest() -> str:
        return open_data(f"folder:{tree}", data_dir=tmp_path, image_size=16, loader="dali").digest

    before = digest()
    first = next((tree / "train" / "left").iterdir())
    first.write_bytes(first.read_bytes() + b"\0")
    assert digest() != before


def test_a_held_out_part_of_a_stream_is_that_of_the_resident_data_set(
    image_tree: Path, tmp_path: Path
):
    where = {"data_dir": tmp_path, "image_size": 16}
    opened = open_data(f"folder:{image_tree}", loader="dali", **where)
    held = load_dataset(f"folder:{image_tree}", **where)
    parts = feed.split_sources(opened, 0.25, 7), feed.split_sources(held, 0.25, 7)
    for streamed, resident in zip(*parts, strict=True):
        assert isinstance(streamed, Files)
        assert torch.equal(streamed.labels, resident[1])
        assert feed.count(streamed) == feed.count(resident) == len(streamed.paths)


def test_the_last_of_each_class_are_held_out_whatever_the_seed(image_tree: Path, tmp_path: Path):
    held = load_dataset(f"folder:{image_tree}", data_dir=tmp_path, image_size=16)
    opened = open_data(f"folder:{image_tree}", loader="dali", data_dir=tmp_path, image_size=16)
    train, val, test = feed.split_sources(held, 0, 7, hold_out=10)
    assert test[0] is held.test_images
    expected = torch.zeros(48, dtype=torch.bool)
    for label in (0, 1):
        expected[(held.train_labels == label).nonzero().flatten()[-5:]] = True
    assert torch.equal(val[0], held.train_images[expected])
    assert torch.equal(val[1], held.train_labels[expected])
    assert torch.equal(train[0], held.train_images[~expected])
    assert torch.equal(feed.split_sources(held, 0, 8, hold_out=10)[1][0], val[0])
    streamed, streamed_val, _ = feed.split_sources(opened, 0, 7, hold_out=10)
    assert torch.equal(streamed.labels, train[1])
    assert torch.equal(streamed_val.labels, val[1])
    names = {Path(path).name for path in streamed_val.paths}
    assert names == {f"{number:03d}.png" for number in range(19, 24)}


@pytest.mark.parametrize(
    ("val_fraction", "hold_out", "message"),
    [
        (0.1, 10, "--val-fraction 0.1 and --hold-out 10 both hold out images; choose one"),
        (0, 5, "--hold-out 5 cannot be divided equally among 2 classes.*for example 4"),
        (0, 1, "--hold-out 1 cannot be divided equally among 2 classes.*for example 2"),
        (0, 48, "--hold-out 48 takes 24 images of each class.*choose at most 46"),
    ],
)
def test_a_part_that_cannot_be_held_out_is_refused(
    image_tree: Path, tmp_path: Path, val_fraction: float, hold_out: int, message: str
):
    held = load_dataset(f"folder:{image_tree}", data_dir=tmp_path, image_size=16)
    with pytest.raises(ResfastError, match=message):
        feed.split_sources(held, val_fraction, 0, hold_out)


def test_the_first_images_of_each_class_are_used(image_tree: Path, tmp_path: Path):
    held = load_dataset(f"folder:{image_tree}", data_dir=tmp_path, image_size=16)
    opened = open_data(f"folder:{image_tree}", loader="dali", data_dir=tmp_path, image_size=16)
    train, val, test = feed.split_sources(held, 0, 7, max_images=11)
    expected = torch.zeros(48, dtype=torch.bool)
    for label in (0, 1):
        expected[(held.train_labels == label).nonzero().flatten()[:5]] = True
    assert torch.equal(train[0], held.train_images[expected])
    assert torch.equal(train[1], held.train_labels[expected])
    assert val is None
    assert test[0] is held.test_images
    streamed, _, _ = feed.split_sources(opened, 0, 7, max_images=11)
    assert {Path(path).name for path in streamed.paths} == {f"{n:03d}.png" for n in range(5)}
    # Images are held out from these.
    train, val, _ = feed.split_sources(held, 0, 7, hold_out=4, max_images=10)
    assert (len(train[0]), len(val[0])) == (6, 4)
    assert torch.equal(val[0][:2], held.train_images[held.train_labels == 0][3:5])
    # More than there are: all of them.
    assert feed.count(feed.split_sources(held, 0, 7, max_images=1000)[0]) == 48
    with pytest.raises(ResfastError, match="--max-images 1 is less than one image for each of 2"):
        feed.split_sources(held, 0, 7, max_images=1)


def test_shards_cannot_be_split(tmp_path: Path):
    shards = Shards(("a.tar",), 8)
    opened = Stream("shards:x", shards, shards, ("a", "b"), 16, "0")
    with pytest.raises(ResfastError, match="--hold-out cannot split shards"):
        feed.split_sources(opened, 0, 0, 2)
    with pytest.raises(ResfastError, match="--max-images cannot choose images from shards"):
        feed.split_sources(opened, 0, 0, max_images=4)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("shards:{tree}", {"loader": "resident"}, "--loader resident cannot read shards"),
        ("folder:{tree}", {"loader": "dali", "skip_corrupt": True}, "--skip-corrupt needs"),
        ("folder:{tar}", {"loader": "dali"}, "cannot read inside the archive .*--shards"),
        ("folder:{tree}/absent", {"loader": "dali"}, "absent"),
        ("shards:{tree}/absent", {}, "absent"),
    ],
)
def test_what_a_loader_cannot_read_is_refused(
    data: str, options: dict, message: str, image_tree: Path, tmp_path: Path
):
    archive = tmp_path / "tree.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(image_tree, "tree")
    with pytest.raises(ResfastError, match=message):
        open_data(
            data.format(tree=image_tree, tar=archive), data_dir=tmp_path, image_size=16, **options
        )


def test_shards_are_not_loaded_whole(tmp_path: Path):
    with pytest.raises(ResfastError, match="cannot read shards"):
        load_dataset(f"shards:{tmp_path}", data_dir=tmp_path)


def test_free_memory_is_that_of_the_machine():
    free = runtime.free_memory(torch.device("cpu"))
    assert 2**24 < free < 2**50
