"""DALI loaders on small images: order, pixels, augmentation, resuming, ranks and bad input."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resfast.data.augment import Augment, parse_augment, sample
from resfast.data.dataset import Files, Shards
from resfast.data.decode import decode_image
from resfast.data.resident import ResidentLoader
from resfast.data.shards import read_shards, write_shards
from resfast.data.statistics import channel_mean_std
from resfast.errors import ResfastError

pytest.importorskip("nvidia.dali", reason="needs nvidia-dali-cuda130")

from resfast.data.dali import Arrays, DaliLoader, mean_std

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
COUNT = 23


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """An image without edges, on which two good resizing filters agree."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    images = np.stack([smooth(seed, 16, 16) for seed in range(COUNT)])
    return Arrays(torch.from_numpy(images), torch.arange(COUNT))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, arrays: Arrays) -> Files:
    """The images of ``arrays`` without loss, each of its own class."""
    folder = tmp_path_factory.mktemp("files")
    paths = []
    for row, image in enumerate(arrays.images.numpy()):
        name = f"{row}.png" if row % 2 else f"longer name ü {row}.webp"
        Image.fromarray(image).save(folder / name, lossless=True)
        paths.append(str(folder / name))
    return Files(tuple(paths), torch.arange(COUNT))


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, files: Files) -> Shards:
    """The images of ``files`` in three archives, without an index."""
    folder = tmp_path_factory.mktemp("shards")
    paths = []
    for ordinal, rows in enumerate(torch.arange(COUNT).split(9)):
        members = {}
        for row in rows.tolist():
            key = f"{row - 9 * ordinal:04d}"  # the same keys in each
            extension = files.paths[row].rpartition(".")[2]
            members[f"{key}.{extension}"] = Path(files.paths[row]).read_bytes()
            members[f"{key}.cls"] = f"{row}\n".encode()
        paths.append(write_tar(folder / f"{ordinal}.tar", members))
    return Shards(tuple(paths), COUNT)


@pytest.fixture(params=["arrays", "files", "shards"])
def source(request: pytest.FixtureRequest) -> Arrays | Files | Shards:
    return request.getfixturevalue(request.param)


def make(source: Arrays | Files | Shards, **options: object) -> DaliLoader:
    common = {
        "batch_size": 4,
        "image_size": 16,
        "mean": MEAN,
        "std": STD,
        "augment": Augment(),
        "classes": COUNT,
        "threads": 1,
    }
    return DaliLoader(source, **(common | options))


def labels_of(loader: DaliLoader, epoch: int = 0) -> list[int]:
    return [label for batch in loader.epoch(epoch) for label in batch.labels.tolist()]


def assert_equal(left: list, right: list) -> None:
    assert len(left) == len(right)
    for batch, other in zip(left, right, strict=True):
        for name, value in batch._asdict().items():
            assert torch.equal(value, getattr(other, name)), name


def test_evaluation_gives_every_image_once_in_order_each_time(source):
    loader = make(source, train=False)
    assert len(loader) == 6
    for _ in range(3):
        batches = list(loader.epoch(0))
        assert [len(batch.labels) for batch in batches] == [4] * 5 + [3]
        assert torch.cat([batch.labels for batch in batches]).tolist() == list(range(COUNT))


def test_evaluation_left_in_the_middle_begins_anew(source):
    loader = make(source, train=False)
    next(iter(loader.epoch(0)))
    assert labels_of(loader) == list(range(COUNT))


def test_evaluation_can_begin_at_a_later_batch(source):
    loader = make(source, train=False)
    labels = torch.cat([batch.labels for batch in loader.epoch(0, 4)])
    assert labels.tolist() == list(range(16, COUNT))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_evaluation_pixels_are_normalized(source, arrays, dtype, tolerance):
    loader = make(source, train=False, dtype=dtype)
    images = torch.cat([batch.images for batch in loader.epoch(0)])
    expected = (arrays.images.permute(0, 3, 1, 2) / 255 - MEAN[:, None, None]) / STD[:, None, None]
    assert images.dtype == dtype
    torch.testing.assert_close(images.float(), expected, atol=tolerance, rtol=tolerance)


def test_batches_are_channels_last(source):
    for train in (True, False):
        images = next(iter(make(source, train=train).epoch(0))).images
        assert images.shape == (4, 3, 16, 16)
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_outlives_the_next_ones(source):
    loader = make(source, train=False, prefetch=1)
    kept, copies = [], []
    for images, *_ in loader.epoch(0):
        kept.append(images)
        copies.append(images.clone())
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))


@pytest.mark.parametrize("policy", ["none", "crop=3,flip=alternating,cutout=4", "strong,crop=3"])
@pytest.mark.parametrize("name", ["arrays", "files"])
def test_training_batches_are_those_of_the_resident_loader(request, arrays, policy, name):
    augment = parse_augment(f"{policy},mixup=0,cutmix=0" if policy != "none" else "none")
    common = {"batch_size": 4, "augment": augment, "classes": COUNT, "seed": 3}
    resident = ResidentLoader(arrays.images, arrays.labels, MEAN, STD, **common)
    loader = make(request.getfixturevalue(name), **common)
    for epoch in (0, 1, 5):
        assert_equal(list(loader.epoch(epoch)), list(resident.epoch(epoch)))
    assert_equal(list(loader.epoch(2, first_step=3)), list(resident.epoch(2, first_step=3)))


def test_arrays_take_random_resized_crop_of_the_resident_loader(arrays):
    common = {"batch_size": 4, "augment": Augment(resize=0.4), "classes": COUNT}
    resident = ResidentLoader(arrays.images, arrays.labels, MEAN, STD, **common)
    assert_equal(list(make(arrays, **common).epoch(1)), list(resident.epoch(1)))


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_a_training_epoch_without_overlap(source, world, drop_last):
    loaders = [make(source, rank=rank, world=world, drop_last=drop_last) for rank in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    for epoch in range(3):
        labels = [labels_of(loader, epoch) for loader in loaders]
        flat = list(itertools.chain(*labels))
        assert len(set(flat)) == len(flat)
        if drop_last:
            assert all(len(part) == COUNT // (4 * world) * 4 for part in labels)
        else:
            # A ragged step may have to leave out fewer images than there are ranks.
            assert COUNT - len(flat) < world


def test_ranks_share_an_evaluation_without_overlap(source):
    labels = [labels_of(make(source, train=False, rank=rank, world=3)) for rank in range(3)]
    assert sorted(itertools.chain(*labels)) == list(range(COUNT))


def test_every_epoch_is_shuffled_and_depends_on_the_seed(source):
    loader = make(source, drop_last=False)
    epochs = [labels_of(loader, epoch) for epoch in range(3)]
    assert all(sorted(labels) == list(range(COUNT)) for labels in epochs)
    assert len({tuple(labels) for labels in (*epochs, range(COUNT))}) == 4
    again = make(source, drop_last=False)
    assert [labels_of(again, epoch) for epoch in range(3)] == epochs
    assert labels_of(make(source, drop_last=False, seed=1)) != epochs[0]


POLICIES = ["crop=3,flip=random,cutout=4", "report-001,crop=2,hue=0.1,noise=0.1,mixup=0.4,cutmix=1"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_saved_position_continues_bit_for_bit(source, policy, tmp_path):
    augment = parse_augment(policy)
    whole = make(source, augment=augment)
    expected = [list(whole.epoch(epoch)) for epoch in range(3)]
    for epoch, step in ((0, 2), (1, 3), (1, 5)):
        first = make(source, augment=augment)
        for earlier in range(epoch):
            list(first.epoch(earlier))
        batches = iter(first.epoch(epoch))
        for _ in range(step):
            next(batches)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second = make(source, augment=augment)
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert_equal(list(second.epoch(epoch, step)), expected[epoch][step:])
        for later in range(epoch + 1, 3):
            assert_equal(list(second.epoch(later)), expected[later])


def test_without_a_saved_position_the_same_batches_are_found_again(source):
    augment = parse_augment(POLICIES[1])
    whole = make(source, augment=augment)
    expected = [list(whole.epoch(epoch)) for epoch in range(2)]
    assert_equal(list(make(source, augment=augment).epoch(1, 2)), expected[1][2:])
    assert_equal(list(whole.epoch(0, 1)), expected[0][1:])


def test_a_position_in_other_shards_is_refused(shards):
    loader = make(shards)
    next(iter(loader.epoch(0)))
    with pytest.raises(ResfastError, match="batch_size 4, but this run has batch_size 5"):
        make(shards, batch_size=5).load_state_dict(loader.state_dict())


def test_two_epochs_at_once_are_refused(source):
    loader = make(source)
    first = iter(loader.epoch(0))
    next(first)
    next(iter(loader.epoch(1)))
    with pytest.raises(RuntimeError, match="later epoch"):
        next(first)


def test_moved_shards_are_augmented_alike(shards, tmp_path):
    moved = []
    for path in shards.paths:
        (tmp_path / os.path.basename(path)).write_bytes(Path(path).read_bytes())
        moved.append(str(tmp_path / os.path.basename(path)))
    augment = Augment(crop=3, flip="random")
    batches = list(make(shards, augment=augment).epoch(0))
    assert_equal(list(make(Shards(tuple(moved), COUNT), augment=augment).epoch(0)), batches)


def test_samples_of_one_name_in_two_shards_are_augmented_apart(tmp_path, arrays):
    buffer = io.BytesIO()
    Image.fromarray(arrays.images[0].numpy()).save(buffer, "PNG")
    members = {"0.png": buffer.getvalue(), "0.cls": b"0"}
    names = ["".join(letters) for letters in itertools.permutations("abc")]
    paths = tuple(write_tar(tmp_path / f"{name}.tar", members) for name in names)
    loader = make(Shards(paths, 6), batch_size=6, augment=Augment(crop=7), classes=1)
    images = next(iter(loader.epoch(0))).images
    assert len({image.numpy().tobytes() for image in images}) >= 5


def test_mixing_takes_the_next_image_of_the_batch(arrays):
    augment = Augment(mixup=1.0)
    images, labels, _ = next(iter(make(arrays, augment=augment).epoch(0)))
    plain, numbers, _ = next(iter(make(arrays).epoch(0)))
    own = labels.gather(1, numbers[:, None])
    torch.testing.assert_close(labels.sum(1), torch.ones(4))
    assert 0 < own[0].item() < 1
    assert (own == own[0]).all()
    expected = own[:, :, None, None] * plain + (1 - own)[:, :, None, None] * plain.roll(-1, 0)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(labels.gather(1, numbers.roll(-1)[:, None]), 1 - own)


def test_dali_alone_gives_the_pixels_of_the_fused_operator(request):
    augment = Augment(crop=5, padding="zero", flip="random")
    for name in ("arrays", "files"):
        source = request.getfixturevalue(name)
        fused, alone = (make(source, augment=augment, finish=f) for f in ("fused", "dali"))
        for (images, labels, _), (other, other_labels, _) in zip(
            fused.epoch(2), alone.epoch(2), strict=True
        ):
            torch.testing.assert_close(other, images, atol=1e-5, rtol=1e-5)
            assert torch.equal(labels, other_labels)


def test_dali_alone_shifts_and_flips_shards(shards, arrays):
    augment = Augment(crop=2, padding="zero", flip="random")
    black = -MEAN / STD
    seen = set()
    for images, labels, _ in make(shards, augment=augment, finish="dali", drop_last=False).epoch(0):
        for image, label in zip(images, labels.tolist(), strict=True):
            plain = (arrays.images[label] / 255 - MEAN) / STD
            padded = black.expand(20, 20, 3).clone()
            padded[2:18, 2:18] = plain
            found = [
                (y, x, flipped)
                for y in range(5)
                for x in range(5)
                for flipped in (False, True)
                if torch.allclose(
                    (padded[y : y + 16, x : x + 16].flip(1) if flipped else
                     padded[y : y + 16, x : x + 16]).permute(2, 0, 1), image, atol=1e-5)
            ]  # fmt: skip
            assert len(found) == 1
            seen.update(found)
    assert len({place[0] for place in seen}) == 5
    assert {place[2] for place in seen} == {False, True}


def test_a_policy_that_dali_cannot_do_is_refused(arrays):
    for text in ("cutout=4", "crop=2", "flip=alternating", "crop=2,padding=zero,mixup=1"):
        with pytest.raises(ResfastError, match="more than DALI alone does"):
            make(arrays, augment=parse_augment(text), finish="dali")


@pytest.mark.parametrize("size", [(40, 60), (61, 33), (8, 12), (16, 21)])
def test_other_sizes_are_cut_to_a_square_and_resized(tmp_path, size):
    image = smooth(1, *size)
    Image.fromarray(image).save(tmp_path / "image.png")
    expected = torch.from_numpy(
        decode_image((tmp_path / "image.png").read_bytes(), 16).astype(np.int32)
    )
    label = torch.zeros(1, dtype=torch.int64)
    for source in (
        Files((str(tmp_path / "image.png"),), label),
        Arrays(image[None], label),
    ):
        loader = make(source, train=False, finish="uint8")
        images = next(iter(loader.epoch(0))).images
        assert images.dtype == torch.uint8
        assert torch.equal(images[0].permute(1, 2, 0).int(), expected)


def gradient(folder: Path, name: str) -> str:
    """An image whose red is its row and whose green is its column, both in pixels."""
    y, x = np.mgrid[0:120, 0:180]
    Image.fromarray(np.stack([y, x, 0 * x], -1).astype(np.uint8)).save(folder / name)
    return str(folder / name)


@pytest.mark.parametrize("kind", ["files", "arrays", "shards"])
def test_random_resized_crop_shows_windows_of_the_whole_image(tmp_path, kind):
    count = 64
    path = gradient(tmp_path, "gradient.png")
    labels = torch.zeros(count, dtype=torch.int64)
    if kind == "files":
        source = Files((path,) * count, labels)
    elif kind == "arrays":
        source = Arrays(np.asarray(Image.open(path))[None].repeat(count, 0), labels)
    else:
        data = Path(path).read_bytes()
        members = {f"{i}.{e}": d for i in range(count) for e, d in (("png", data), ("cls", b"0"))}
        source = Shards((write_tar(tmp_path / "0.tar", members),), count)
    loader = make(
        source,
        augment=Augment(resize=0.25),
        batch_size=count,
        mean=torch.zeros(3),
        std=torch.ones(3) / 255,
    )
    images = next(iter(loader.epoch(0))).images
    inner = images[:, :2, 2:-2, 2:-2]  # away from what the filter does at the edge
    height = (inner[:, 0, -1].mean(1) - inner[:, 0, 0].mean(1)) * 16 / 11
    width = (inner[:, 1, :, -1].mean(1) - inner[:, 1, :, 0].mean(1)) * 16 / 11
    area, ratio = height * width / (120 * 180), width / height
    assert area.min() > 0.22
    assert area.max() < 1.02
    assert area.std() > 0.1
    assert ratio.min() > 0.7
    assert ratio.max() < 1.55
    assert ratio.std() > 0.05
    top = inner[:, 0].mean((1, 2)) - height / 2
    left = inner[:, 1].mean((1, 2)) - width / 2
    assert top.min() > -3
    assert left.min() > -3
    assert (top + height).max() < 123
    assert (left + width).max() < 183
    room = width < 150
    assert room.sum() > 20
    place = left[room] / (180 - width[room])
    assert place.min() < 0.25
    assert place.max() > 0.75


def test_random_resized_crop_leaves_the_rest_of_the_policy(files, arrays):
    """At resize=1 - epsilon the window is nearly the whole image, so the rest can be seen."""
    augment = Augment(resize=1.0, crop=3, flip="random", padding="zero")
    nearly = Augment(resize=0.999999, crop=3, flip="random", padding="zero")
    indices = torch.arange(COUNT)
    drawn = sample(augment, indices, size=(16, 16), channels=3, seed=0, epoch=0)
    assert drawn.shift.abs().max() == 3
    cut = 0
    for (images, labels, _), (others, *_) in zip(
        make(files, augment=augment).epoch(0), make(files, augment=nearly).epoch(0), strict=True
    ):
        black = images == (-MEAN / STD)[:, None, None]
        cut += black.sum()
        assert torch.equal(black.all(1), (others == (-MEAN / STD)[:, None, None]).all(1))
        assert len(labels) == 4
    assert cut > 0


def test_mean_and_std_are_those_of_the_decoded_set(source, arrays):
    mean, std = mean_std(source, 16, batch_size=5, threads=1)
    expected_mean, expected_std = channel_mean_std(arrays.images)
    assert mean.dtype == std.dtype == torch.float32
    assert torch.equal(mean, expected_mean)
    assert torch.equal(std, expected_std)


def test_arrays_may_be_a_memmap_with_any_channels(tmp_path):
    images = np.memmap(tmp_path / "images", np.uint8, "w+", shape=(9, 12, 12, 1))
    images[:] = np.arange(9)[:, None, None, None]
    source = Arrays(images, torch.arange(9))
    loader = make(
        source, image_size=12, mean=torch.zeros(1), std=torch.ones(1), classes=9, train=False
    )
    for batch, labels, _ in loader.epoch(0):
        assert batch.shape[1:] == (1, 12, 12)
        torch.testing.assert_close(batch[:, 0, 0, 0] * 255, labels.float())


def corrupt(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(smooth(0, 40, 40)).save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    return {
        "truncated": data[: len(data) // 2],
        "without its end": data[:-3],
        "header only": data[:100],
        "empty": b"",
        "text": b"this is not an image\n" * 9,
    }[kind]


@pytest.mark.parametrize("kind", ["truncated", "without its end", "header only", "empty", "text"])
def test_a_corrupt_file_is_named(files, tmp_path, kind):
    (tmp_path / "bad.jpg").write_bytes(corrupt(kind))
    paths = (*files.paths[:17], str(tmp_path / "bad.jpg"), *files.paths[18:])
    for options in ({"train": False}, {"augment": Augment(resize=0.5)}):
        loader = make(Files(paths, files.labels), drop_last=False, **options)
        with pytest.raises(ResfastError, match=r"bad\.jpg is not a readable image"):
            list(loader.epoch(0))
        with pytest.raises(ResfastError, match=r"bad\.jpg is not a readable image"):
            list(loader.epoch(0))  # again, with a new pipeline


def test_a_file_removed_after_the_start_is_named(files, tmp_path):
    gone = tmp_path / "gone.png"
    gone.write_bytes(Path(files.paths[1]).read_bytes())
    loader = make(Files((*files.paths[:-1], str(gone)), files.labels), train=False)
    gone.unlink()
    with pytest.raises(ResfastError, match=r"gone\.png cannot be read"):
        list(loader.epoch(0))


def test_a_corrupt_image_in_a_shard_is_named(tmp_path, files):
    good = Path(files.paths[1]).read_bytes()
    members = {}
    for key in range(8):
        members[f"{key}.png"] = corrupt("truncated") if key == 5 else good
        members[f"{key}.cls"] = b"1"
    path = write_tar(tmp_path / "shard.tar", members)
    with pytest.raises(ResfastError, match=r"5\.png in .*shard\.tar is not a readable"):
        list(make(Shards((path,), 8), train=False).epoch(0))


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        (b"23", r"shard\.tar:\d+:7\.png has the class '23'"),
        (b"-1", r"shard\.tar:\d+:7\.png has the class '-1'"),
        (b"cat", r"shard\.tar:\d+:7\.png has the class 'cat'"),
        (b"  ", r"7\.cls in .*shard\.tar has no class"),
    ],
)
def test_a_wrong_class_in_a_shard_is_named(tmp_path, files, label, shown):
    members = {"7.png": Path(files.paths[1]).read_bytes(), "7.cls": label}
    path = write_tar(tmp_path / "shard.tar", members)
    with pytest.raises(ResfastError, match=shown):
        list(make(Shards((path,), 1), train=False).epoch(0))


def test_bad_sources_are_refused_at_the_start(tmp_path, files, arrays):
    first = Path(files.paths[1]).read_bytes()
    none = torch.zeros(0, dtype=torch.int64)

    def shard(name: str, **members: bytes) -> Shards:
        return Shards((write_tar(tmp_path / name, members),), 1)

    (tmp_path / "text.tar").write_text("not a tar")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(files.paths[1], "a.png")
    cases = {
        "does not exist: restore": Files(("nowhere/a.png",), torch.zeros(1, dtype=torch.int64)),
        "list of images is empty": Files((), none),
        "list of shards is empty": Shards((), 0),
        "2 labels for 23 images": Files(files.paths, torch.zeros(2, dtype=torch.int64)),
        "from 1 to 23; expected int64 from 0 to 22": Files(files.paths, torch.arange(COUNT) + 1),
        "float32": Arrays(arrays.images.float(), arrays.labels),
        "shard .*gone.tar does not exist": Shards((str(tmp_path / "gone.tar"),), 1),
        "not an uncompressed tar .*": Shards((str(tmp_path / "text.tar"),), 1),
        "packed.tar is not an uncompressed": Shards((str(tmp_path / "packed.tar"),), 1),
        "has no b.cls": shard("1.tar", **{"a.png": first, "a.cls": b"0", "b.png": first}),
        r"has no image a\.jpg\|": shard("2.tar", **{"a.cls": b"0"}),
        "has no samples": shard("3.tar"),
        "has 0 bytes; expected a class": shard("4.tar", **{"a.png": first, "a.cls": b""}),
    }
    for message, source in cases.items():
        with pytest.raises(ResfastError, match=message):
            make(source, train=False)


def test_bad_values_are_refused(arrays):
    for message, options in {
        "batch size 24 does not fit 23": {"batch_size": 24},
        "batch size 0": {"batch_size": 0, "train": False},
        "rank 2": {"rank": 2, "world": 2},
        "--prefetch 0": {"prefetch": 0},
        "crop=16 does not fit": {"augment": Augment(crop=16)},
        "mean has 1 channels": {"mean": torch.zeros(1)},
    }.items():
        with pytest.raises(ResfastError, match=message):
            make(arrays, **options)
    with pytest.raises(TypeError, match="float64"):
        make(arrays, dtype=torch.float64)


def test_missing_dali_is_reported_when_it_is_requested(arrays, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ResfastError, match="pip install nvidia-dali"):
        make(arrays)


def test_importing_the_loader_does_not_import_dali():
    code = "import sys, resfast.data.dali as d; assert 'nvidia.dali' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("packed", [False, True], ids=["directory", "archive"])
def test_written_shards_hold_the_folder(image_tree, tmp_path, packed):
    path = image_tree
    if packed:
        path = tmp_path / "tree.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            tar.add(image_tree, ".")
    lines: list[str] = []
    written = write_shards(path, tmp_path / "out", images_per_shard=20, report=lines.append)
    assert [shard.name for shard in written] == [
        *(f"train-{ordinal:05d}.tar" for ordinal in range(3)),
        "test-00000.tar",
    ]
    found = read_shards(tmp_path / "out")
    assert found.classes == ("left", "right")
    assert (found.train.count, found.test.count) == (48, 16)
    assert len(lines) == 1
    for split, shards in (("train", found.train), ("test", found.test)):
        files = sorted((image_tree / split).glob("*/*.png"))
        contents = {}
        for shard in shards.paths:
            with tarfile.open(shard) as tar:
                contents |= {member.name: tar.extractfile(member).read() for member in tar}
        for row, file in enumerate(files):
            assert contents[f"{row:08d}.png"] == file.read_bytes()
            assert found.classes[int(contents[f"{row:08d}.cls"])] == file.parent.name
        loader = make(shards, train=False, classes=2, batch_size=48)
        labels = next(iter(loader.epoch(0))).labels
        in_order = [found.classes.index(file.parent.name) for file in files]
        assert (labels.tolist() == in_order) == (split == "test")
        assert sorted(labels.tolist()) == in_order


def test_shards_are_written_alike_each_time(image_tree, tmp_path):
    for name in ("a", "b"):
        write_shards(image_tree, tmp_path / name, report=lambda line: None)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_bad_folders_of_shards_are_refused(image_tree, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ResfastError, match="is not a folder"):
        read_shards(out)
    out.mkdir()
    with pytest.raises(ResfastError, match="missing or incomplete"):
        read_shards(out)
    with pytest.raises(ResfastError, match="--images-per-shard 0"):
        write_shards(image_tree, out, images_per_shard=0, report=lambda line: None)
    write_shards(image_tree, out, report=lambda line: None)
    with pytest.raises(ResfastError, match="already has shards"):
        write_shards(image_tree, out, report=lambda line: None)
    (out / "train-00000.tar").unlink()
    with pytest.raises(ResfastError, match=r"train-00000\.tar is missing"):
        read_shards(out)
    (out / "classes.json").write_text('{"classes": ["a"]}')
    with pytest.raises(ResfastError, match="is damaged"):
        read_shards(out)
    (tmp_path / "a file").write_text("")
    with pytest.raises(ResfastError, match="cannot write shards"):
        write_shards(image_tree, tmp_path / "a file" / "out", report=lambda line: None)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["none", *POLICIES, "crop=3,rotate=20,contrast=0.4"])
def test_gpu_batches_are_those_of_the_cpu(source, policy):
    augment = parse_augment(policy)
    if augment.resize < 1 and isinstance(source, Shards):
        pytest.skip("DALI draws a different window on each device")
    loaders = [make(source, augment=augment, device=device) for device in ("cpu", "cuda")]
    for epoch in range(2):
        batches = zip(*(loader.epoch(epoch) for loader in loaders), strict=True)
        for (images, labels, _), (on_gpu, gpu_labels, _) in batches:
            assert on_gpu.is_cuda
            assert gpu_labels.is_cuda
            assert on_gpu.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(gpu_labels.cpu(), labels)
            # Two grey levels of another resize, stretched by colour and normalization.
            torch.testing.assert_close(on_gpu.cpu(), images, atol=0.15, rtol=0)


@pytest.mark.gpu
def test_gpu_batches_outlive_the_next_ones(source):
    loader = make(source, device="cuda", train=False, prefetch=1)
    kept, copies = [], []
    for images, *_ in loader.epoch(0):
        kept.append(images)
        copies.append(images.cpu())
    for images, copy in zip(kept, copies, strict=True):
        assert torch.equal(images.cpu(), copy)


@pytest.mark.gpu
def test_gpu_jpegs_are_decoded_as_pillow_does(tmp_path):
    paths = []
    for row in range(8):
        Image.fromarray(smooth(row, 48, 64)).save(tmp_path / f"{row}.jpg", quality=95)
        paths.append(str(tmp_path / f"{row}.jpg"))
    source = Files(tuple(paths), torch.zeros(8, dtype=torch.int64))
    loader = make(source, device="cuda", train=False, finish="uint8", batch_size=8)
    images = next(iter(loader.epoch(0))).images
    for path, image in zip(paths, images.cpu(), strict=True):
        expected = decode_image(Path(path).read_bytes(), 16)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


@pytest.mark.gpu
def test_gpu_names_a_corrupt_file(files, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(corrupt("truncated"))
    paths = (*files.paths[:-1], str(tmp_path / "bad.jpg"))
    with pytest.raises(ResfastError, match=r"bad\.jpg is not a readable"):
        list(make(Files(paths, files.labels), train=False, device="cuda").epoch(0))


@pytest.mark.gpu
def test_gpu_position_continues_bit_for_bit(shards):
    augment = parse_augment(POLICIES[0])
    whole = make(shards, augment=augment, device="cuda")
    batches = iter(whole.epoch(0))
    next(batches)
    state = whole.state_dict()
    expected = list(batches)
    second = make(shards, augment=augment, device="cuda")
    second.load_state_dict(state)
    assert_equal(list(second.epoch(0, 1)), expected)
