"""Both loaders give the same pixels of every kind of image file, or refuse it in the same words."""

from __future__ import annotations

import functools
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from resfast.data.augment import Augment
from resfast.data.dataset import Files, Shards
from resfast.data.decode import decode_image, fit
from resfast.data.sources import load_dataset
from resfast.errors import ResfastError
from tests import image_kinds

pytest.importorskip("nvidia.dali", reason="needs nvidia-dali-cuda130")
pytest.importorskip("PIL.AvifImagePlugin", reason="needs a Pillow with AVIF")

from resfast.data.dali import Arrays, DaliLoader

SIZES = (24, 16, 40)
INTACT, UNREADABLE = image_kinds.intact(), image_kinds.unreadable()


def stream(source: Files | Shards | Arrays, size: int, **options: object) -> DaliLoader:
    common = {"batch_size": len(source), "augment": Augment(), "classes": 1, "threads": 1}
    common |= {"mean": torch.zeros(3), "std": torch.ones(3), "train": False, "finish": "uint8"}
    return DaliLoader(source, image_size=size, **(common | options))


def first(loader: DaliLoader) -> np.ndarray:
    """Images of the first batch, uint8 ``[B, S, S, C]``."""
    return next(iter(loader.epoch(0))).images.permute(0, 2, 3, 1).numpy().copy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kinds")
    for name, data in INTACT.items():
        (path / f"{name.replace(':', '')}.jpg").write_bytes(data)
    return path


@pytest.fixture(scope="module")
def streamed(folder: Path):
    paths = tuple(str(folder / f"{name.replace(':', '')}.jpg") for name in INTACT)
    source = Files(paths, torch.zeros(len(paths), dtype=torch.int64))

    @functools.cache
    def at(size: int) -> dict[str, np.ndarray]:
        return dict(zip(INTACT, first(stream(source, size)), strict=True))

    return at


@pytest.mark.parametrize("name", INTACT)
def test_both_loaders_give_the_same_pixels(streamed, name):
    for size in SIZES:
        assert np.array_equal(streamed(size)[name], decode_image(INTACT[name], size)), size


def refusal(call) -> str:
    try:
        call()
    except ResfastError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", UNREADABLE)
def test_both_loaders_refuse_a_file_in_the_same_words(tmp_path, name):
    for split in ("train", "test"):
        (tmp_path / "tree" / split / "a").mkdir(parents=True)
        (tmp_path / "tree" / split / "a" / "good.png").write_bytes(INTACT["png RGB"])
    bad = tmp_path / "tree" / "train" / "a" / "bad.jpg"
    bad.write_bytes(UNREADABLE[name])
    report = {"report": lambda line: None}
    source = f"folder:{tmp_path / 'tree'}"
    resident = refusal(lambda: load_dataset(source, data_dir=tmp_path, image_size=24, **report))
    files = Files((str(bad),), torch.zeros(1, dtype=torch.int64))
    assert refusal(lambda: first(stream(files, 24))) == resident
    if name not in ("jpeg damaged", "png without its end"):  # Pillow reads them
        assert "bad.jpg is not a readable image (" in resident


def test_what_dali_fails_at_is_decoded_by_pillow_from_then_on(tmp_path, caplog):
    damaged = UNREADABLE["png without its end"]
    expected = [decode_image(data, 24) for data in (INTACT["jpeg 4:4:4"], damaged)]
    paths = []
    for row in range(6):
        paths.append(str(tmp_path / f"{row}.jpg"))
        Path(paths[-1]).write_bytes(damaged if row == 3 else INTACT["jpeg 4:4:4"])
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for row, path in enumerate(paths):
            (tmp_path / f"{row}.cls").write_bytes(b"0")
            for name in (path, str(tmp_path / f"{row}.cls")):
                tar.add(name, Path(name).name)
    sources = (
        Files(tuple(paths), torch.zeros(6, dtype=torch.int64)),
        Shards((str(tmp_path / "0.tar"),), 6),
    )
    for source in sources:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "resfast"):
            loader = stream(source, 24, batch_size=2)
            for _ in range(2):
                batches = [batch.images.permute(0, 2, 3, 1) for batch in loader.epoch(0)]
                images = torch.cat(batches).numpy()
                assert len(images) == 6
                for row, image in enumerate(images):
                    assert np.array_equal(image, expected[row == 3])
        (line,) = [record.getMessage() for record in caplog.records]
        assert "DALI cannot decode an image that Pillow can" in line


def test_a_position_in_shards_is_restored_after_pillow_took_over(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for row in range(6):
            damaged = row == 1
            image = UNREADABLE["png without its end"] if damaged else INTACT["jpeg 4:4:4"]
            for name, data in ((f"{row}.jpg", image), (f"{row}.cls", b"0")):
                (tmp_path / name).write_bytes(data)
                tar.add(tmp_path / name, name)
    source = Shards((str(tmp_path / "0.tar"),), 6)
    whole = stream(source, 24, batch_size=2, train=True)
    batches = iter(whole.epoch(0))
    next(batches)
    state = whole.state_dict()
    rest = [batch.images for batch in batches]
    state_before = {name: value for name, value in state.items() if name != "graph"}
    for saved in (state, state_before):  # one that an earlier version saved is read again
        again = stream(source, 24, batch_size=2, train=True)
        again.load_state_dict(saved)
        for batch, other in zip(again.epoch(0, 1), rest, strict=True):
            assert torch.equal(batch.images, other)


def test_how_many_images_pillow_decodes_is_said_once(tmp_path, caplog):
    names = ("gif", "jpeg 4:4:4", "avif", "png RGB")
    for name in names:
        (tmp_path / name).write_bytes(INTACT[name])
    paths = tuple(str(tmp_path / name) for name in names)
    loader = stream(Files(paths, torch.zeros(4, dtype=torch.int64)), 24)
    with caplog.at_level(logging.WARNING, "resfast"):
        for epoch in range(3):
            list(loader.epoch(epoch))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("Pillow has decoded 2 of 4 images")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_of_another_size_are_resized_by_the_same_filter(channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 30, 20, channels), dtype=np.uint8)
    source = Arrays(images, torch.zeros(2, dtype=torch.int64))
    zeros = torch.zeros(channels)
    found = first(stream(source, 16, mean=zeros, std=zeros + 1))
    for image, resized in zip(images, found, strict=True):
        assert np.array_equal(fit(image, 16), resized)
        for channel in range(channels):  # each on its own
            alone = np.ascontiguousarray(image[..., channel : channel + 1])
            assert np.array_equal(fit(alone, 16)[..., 0], resized[..., channel])


def test_random_resized_crops_are_made_of_every_kind(folder):
    paths = tuple(str(folder / f"{name.replace(':', '')}.jpg") for name in INTACT)
    source = Files(paths, torch.zeros(len(paths), dtype=torch.int64))
    loader = stream(source, 16, train=True, augment=Augment(resize=0.5), finish="uint8")
    images = first(loader)
    assert images.shape == (len(INTACT), 16, 16, 3)
    assert np.array_equal(
        images, first(stream(source, 16, train=True, augment=Augment(resize=0.5)))
    )
