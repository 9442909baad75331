"""The data readers, the cache of decoded images, and atomic writing."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resfast import atomic
from resfast.data import dataset, decode, download, folder, sources
from resfast.data.sources import load_dataset
from resfast.data.split import split_validation
from resfast.data.statistics import channel_mean_std
from resfast.errors import ResfastError

SIZE = 16
MODES = ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16")


def make_image(mode: str = "RGB", width: int = SIZE, height: int = SIZE, seed: int = 0):
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def encode(image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def add(root: Path, name: str, data: bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    seed = 0
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                seed += 1
                add(root, f"{split}/{name}/{i}.png", encode(make_image(seed=seed)))
    return root


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def load(tmp_path: Path, lines: list[str]):
    def load(path: Path | str, **options):
        options = {"image_size": SIZE, "data_dir": tmp_path / "data", **options}
        return load_dataset(f"folder:{path}", report=lines.append, **options)

    return load


def pack(root: Path, archive: Path, mode: str = "w", prefix: str = "") -> Path:
    with tarfile.open(archive, mode) as tar:
        for path in sorted(root.rglob("*"), reverse=True):
            tar.add(path, prefix + path.relative_to(root).as_posix(), recursive=False)
    return archive


def pack_members(archive: Path, *members: tarfile.TarInfo | str) -> Path:
    data = encode(make_image())
    with tarfile.open(archive, "w") as tar:
        for member in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data) if member.isfile() else None)
    return archive


def same(a: dataset.Dataset, b: dataset.Dataset) -> bool:
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and (
        (a.classes, a.digest, a.skipped) == (b.classes, b.digest, b.skipped)
    )


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert ": " in text  # a remedy follows
    return text


# --- the folder reader -----------------------------------------------------------------------


def test_a_tree_is_read_in_order_with_labels_by_sorted_class_name(tree, load):
    data = load(tree)
    assert data.name == f"folder:{tree}"
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    assert data.train_labels.dtype == torch.int64
    for images, count in ((data.train_images, 6), (data.test_images, 4)):
        assert images.dtype == torch.uint8
        assert images.shape == (count, SIZE, SIZE, 3)
        assert images.is_contiguous()
    expected = np.asarray(Image.open(tree / "train/dog/1.png"))
    assert np.array_equal(data.train_images[4].numpy(), expected)
    assert int(data.digest, 16) >= 0


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.TGZ", "w:gz"), ("a.tar.xz", "w:xz"),
     ("a.tar.bz2", "w:bz2")],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "./", "top/"])
def test_a_tar_gives_what_its_directory_gives(tree, load, tmp_path, name, mode, prefix):
    add(tree, "train/cat-2/x.png", encode(make_image(seed=7)))  # "-" sorts before "/"
    add(tree, "test/cat-2/sub/x.png", encode(make_image(seed=8)))
    assert same(load(pack(tree, tmp_path / name, mode, prefix)), load(tree))


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
@pytest.mark.parametrize("packed", ["", "flat", "top"])
def test_a_folder_for_validation_takes_the_place_of_a_test_folder(
    tree, load, lines, tmp_path, name, packed
):
    expected = load(tree)
    add(tree, "validation/cat/9.png" if name != "validation" else "x/y.png", encode(make_image()))
    shutil.move(tree / "test", tree / name)
    found = (
        load(pack(tree, tmp_path / "a.tar", prefix="top/" * (packed == "top")))
        if packed
        else load(tree)
    )
    assert found.digest == expected.digest
    shutil.rmtree(tree / name / "dog")
    message = rf"the classes in .*/{name} differ from the training classes \(missing: dog"
    with pytest.raises(ResfastError, match=message):
        load(pack(tree, tmp_path / "a.tar") if packed else tree)


def test_a_test_folder_comes_before_one_for_validation(tree, load):
    expected = load(tree)
    add(tree, "val/owl/0.png", encode(make_image()))
    assert load(tree).digest == expected.digest


def test_nothing_of_a_tar_is_extracted(tree, load, tmp_path):
    archive = pack(tree, tmp_path / "a.tar")
    before = set(tmp_path.rglob("*"))
    load(archive, data_dir=tmp_path / "elsewhere")
    new = {path.suffix for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert new == {".safetensors"}


def test_the_last_of_two_tar_members_of_one_name_counts(tree, load, tmp_path):
    archive = pack(tree, tmp_path / "a.tar")
    shutil.copy(tree / "train/dog/2.png", tree / "train/cat/0.png")
    with tarfile.open(archive, "a") as tar:
        tar.add(tree / "train/cat/0.png", "train/cat/0.png")
    assert same(load(archive), load(tree))


def test_suffixes_of_any_case_subfolders_and_links_are_read_and_other_files_counted(
    tree, load, lines, tmp_path
):
    add(tree, "train/cat/deep/er/a.JPEG", encode(make_image(), "JPEG"))
    add(tree, "train/cat/b.Jpg", encode(make_image(), "JPEG"))
    add(tree, "train/cat/c.webp", encode(make_image(), "WEBP"))
    outside = add(tmp_path, "outside/d.png", encode(make_image()))
    (tree / "train/cat/linked").symlink_to(outside.parent)
    (tree / "train/cat/loop").symlink_to(tree / "train/cat")
    add(tree, "train/cat/notes.txt", b"x")
    add(tree, "train/loose.png", encode(make_image()))
    add(tree, "train/cat/.hidden.png", b"x")
    add(tree, "train/.git/x.png", b"x")
    data = load(tree)
    assert data.train_labels.tolist() == [0] * 7 + [1] * 3
    assert sum("ignored 2 files" in line for line in lines) == 1
    assert any("reading 14 images from" in line for line in lines)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    image = make_image(mode)
    decoded = decode.decode_image(encode(image, "JPEG" if mode == "CMYK" else "PNG"), SIZE)
    assert decoded.shape == (SIZE, SIZE, 3)
    assert decoded.dtype == np.uint8
    if mode == "I;16":
        scaled = np.round(np.asarray(image) / 257.0).astype(np.uint8)
        assert np.array_equal(decoded, scaled[..., None].repeat(3, -1))
    elif mode != "CMYK":
        assert np.array_equal(decoded, np.asarray(image.convert("RGB")))


def test_a_palette_with_transparency_is_read_without_a_warning(recwarn):
    image = make_image("P")
    data = encode(image, transparency=bytes(range(256)))
    assert np.array_equal(decode.decode_image(data, SIZE), np.asarray(image.convert("RGB")))
    assert not recwarn.list


def test_exif_orientation_is_honoured():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = make_image()
    decoded = decode.decode_image(encode(image, exif=exif), SIZE)
    assert np.array_equal(decoded, np.rot90(np.asarray(image), -1))


def test_an_image_of_the_wanted_size_is_untouched_and_a_larger_one_is_cut_at_its_centre():
    pixels = np.zeros((SIZE, 3 * SIZE, 3), np.uint8)
    pixels[:, SIZE : 2 * SIZE] = np.asarray(make_image())
    decoded = decode.decode_image(encode(Image.fromarray(pixels)), SIZE)
    assert np.array_equal(decoded, pixels[:, SIZE : 2 * SIZE])


def test_downscaling_is_antialiased():
    stripes = np.zeros((8 * SIZE, 8 * SIZE, 3), np.uint8)
    stripes[:, ::2] = 255
    decoded = decode.decode_image(encode(Image.fromarray(stripes)), SIZE)
    assert np.abs(decoded[:, 2:-2].astype(int) - 127).max() <= 3  # the border sees fewer stripes


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    kind=st.sampled_from(("PNG", "JPEG", "WEBP")),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    size=st.integers(8, 40),
)
def test_any_size_and_mode_is_decoded_to_uint8_rgb_of_the_wanted_size(
    mode, kind, width, height, size
):
    if kind == "JPEG" and mode in ("P", "RGBA", "LA", "I;16"):
        kind = "PNG"
    if mode == "CMYK":
        kind = "JPEG"
    if kind == "WEBP" and mode == "I;16":
        kind = "PNG"
    decoded = decode.decode_image(encode(make_image(mode, width, height), kind), size)
    assert decoded.dtype == np.uint8
    assert decoded.shape == (size, size, 3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_image_is_decoded_or_fails_with_a_known_error(data):
    kind = data.draw(st.sampled_from(("PNG", "JPEG", "WEBP")))
    broken = bytearray(encode(make_image(), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    broken = broken[: data.draw(st.integers(0, len(broken)))]
    try:
        assert decode.decode_image(bytes(broken), SIZE).shape == (SIZE, SIZE, 3)
    except decode.decode_errors():
        pass


def test_threads_and_no_threads_give_the_same_images(tree, load, tmp_path, monkeypatch):
    for i in range(40):
        add(tree, f"train/cat/big{i}.png", encode(make_image("RGB", 90, 80, seed=i)))
    monkeypatch.setattr(decode, "_BATCH_IMAGES", 3)
    results = []
    for limit in (0, 1 << 40):
        monkeypatch.setattr(decode, "_THREAD_BYTES", limit)
        results.append(load(tree, data_dir=tmp_path / str(limit)))
    assert same(*results)


# --- errors of the folder reader -------------------------------------------------------------


def test_a_missing_path_is_an_error(load, tmp_path):
    with pytest.raises(ResfastError, match="does not exist") as error:
        load(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in one_sentence(error)


def test_an_empty_path_is_an_error(load):
    with pytest.raises(ResfastError, match="has no path"):
        load("")


def test_a_file_that_is_no_archive_is_an_error(load, tmp_path):
    with pytest.raises(ResfastError, match="neither a directory nor a known archive") as error:
        load(add(tmp_path, "images.zip", b"PK"))
    one_sentence(error)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_missing_split_is_an_error(tree, load, tmp_path, split, packed):
    shutil.rmtree(tree / split)
    with pytest.raises(ResfastError, match=f"no {split} folder") as error:
        load(pack(tree, tmp_path / "a.tar") if packed else tree)
    one_sentence(error)


def test_a_directory_above_the_tree_is_an_error_that_names_the_tree(tree, load):
    with pytest.raises(ResfastError, match=f"use --data folder:{tree}"):
        load(tree.parent)


@pytest.mark.parametrize("packed", [False, True])
def test_no_classes_is_an_error(tmp_path, load, packed):
    for split in ("train", "test"):
        (tmp_path / "tree" / split).mkdir(parents=True)
    with pytest.raises(ResfastError, match="no class folders"):
        load(pack(tmp_path / "tree", tmp_path / "a.tar") if packed else tmp_path / "tree")


@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_class_is_an_error_that_names_it(tree, load, tmp_path, packed):
    for path in (tree / "test/dog").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(ResfastError, match=r"the class 'dog' in \S+test/dog is empty") as error:
        load(pack(tree, tmp_path / "a.tar") if packed else tree)
    one_sentence(error)


def test_test_classes_that_differ_are_an_error_that_names_them(tree, load):
    (tree / "test/dog").rename(tree / "test/wolf")
    with pytest.raises(ResfastError, match=r"missing: dog; extra: wolf") as error:
        load(tree)
    one_sentence(error)


def test_an_unreadable_directory_is_an_error(tree, load, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ResfastError, match=r"dog cannot be read \(Permission denied\)") as error:
        load(tree)
    one_sentence(error)


def test_an_unreadable_file_is_an_error_even_when_skipping_corrupt_ones(tree, load):
    (tree / "train/cat/broken.png").symlink_to(tree / "gone.png")
    with pytest.raises(ResfastError, match=r"broken\.png cannot be read"):
        load(tree, skip_corrupt=True)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_an_archive_cut_anywhere_is_an_error(tree, load, tmp_path, mode):
    whole = pack(tree, tmp_path / "whole.tar", mode).read_bytes()
    cuts = {0, 1, 5, len(whole) // 3, len(whole) // 2, len(whole) - 1}
    if mode == "w":  # before the end marker, which fills up to 10,240 bytes
        with tarfile.open(tmp_path / "whole.tar") as tar:
            member = tar.getmembers()[-1]
            end = member.offset_data + (member.size + 511) // 512 * 512
        cuts = {0, 1, 511, 512, 1000, end // 2, member.offset, member.offset_data, end, end + 100}
    for cut in cuts:
        archive = add(tmp_path, "cut.tar", whole[:cut])
        with pytest.raises(ResfastError, match=r"truncated or is not a valid archive") as error:
            load(archive)
        one_sentence(error)


def test_garbage_for_an_archive_or_inside_one_is_an_error(tree, load, tmp_path):
    with pytest.raises(ResfastError, match="not a valid archive"):
        load(add(tmp_path, "a.tar", b"garbage" * 1000))
    data = bytearray(pack(tree, tmp_path / "b.tar").read_bytes())
    with tarfile.open(tmp_path / "b.tar") as tar:
        offset = tar.getmembers()[3].offset
    data[offset : offset + 512] = b"\x55" * 512
    with pytest.raises(ResfastError, match="not a valid archive"):
        load(add(tmp_path, "b.tar", bytes(data)))


def linked(kind: bytes, target: str = "train/cat/0.png") -> tarfile.TarInfo:
    member = tarfile.TarInfo("train/cat/odd.png")
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "member",
    ["/train/cat/x.png", "../x.png", "train/cat/../../../x.png", linked(tarfile.SYMTYPE),
     linked(tarfile.LNKTYPE, "../0.png"), linked(tarfile.LNKTYPE, "train/cat/odd.png"),
     linked(tarfile.CHRTYPE), linked(tarfile.FIFOTYPE)],
    ids=["absolute", "parent", "parent-inside", "symlink", "outside", "itself", "device", "fifo"],
)  # fmt: skip
def test_an_unsafe_tar_member_is_refused_by_name(load, tmp_path, member):
    archive = pack_members(tmp_path / "a.tar", "train/cat/0.png", "test/cat/0.png", member)
    name = member if isinstance(member, str) else member.name
    with pytest.raises(ResfastError) as error:
        load(archive)
    assert repr(name) in one_sentence(error)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_hard_links_in_an_archive_are_read(tree, load, tmp_path, mode):
    expected = load(tree)
    for file in sorted((tree / "train").glob("*/*.png")):  # tar stores the second name as a link
        (tree / f"0-{file.parent.name}-{file.name}").hardlink_to(file)
    with tarfile.open(tmp_path / "a.tar", mode) as tar:
        tar.add(tree, "tree")
        assert sum(member.islnk() for member in tar.getmembers()) > 0
    assert load(tmp_path / "a.tar").digest == expected.digest


def test_a_tar_of_several_trees_is_an_error(load, tmp_path):
    names = [f"{top}/{split}/cat/0.png" for top in "ab" for split in ("train", "test")]
    with pytest.raises(ResfastError, match=r"several trees \(a, b\)"):
        load(pack_members(tmp_path / "a.tar", *names))


def test_a_tar_with_files_in_the_place_of_folders_is_an_error(load, tmp_path):
    with pytest.raises(ResfastError, match="no train folder"):
        load(pack_members(tmp_path / "a.tar", "x", "x/train", "x/test"))


@pytest.mark.parametrize(
    "data", [b"", b"no image", encode(make_image())[:60], encode(make_image(), "JPEG")[:-200]],
    ids=["empty", "text", "cut-png", "cut-jpeg"],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_a_corrupt_image_is_an_error_that_names_it_or_is_skipped(
    tree, load, lines, tmp_path, data, packed
):
    add(tree, "train/cat/1.png", data)
    path = pack(tree, tmp_path / "a.tar") if packed else tree
    with pytest.raises(ResfastError, match=r"train/cat/1\.png is not a readable") as error:
        load(path)
    assert "--skip-corrupt" in one_sentence(error)

    for _ in range(2):  # decoded, then from the cache
        lines.clear()
        skipping = load(path, skip_corrupt=True)
        assert skipping.skipped == ("train/cat/1.png",)
        assert sum("skipped 1 corrupt images" in line for line in lines) == 1
        assert skipping.train_labels.tolist() == [0, 0, 1, 1, 1]
        expected = np.asarray(Image.open(tree / "train/cat/2.png"))
        assert np.array_equal(skipping.train_images[1].numpy(), expected)


def test_a_class_left_empty_by_skipping_is_an_error(tree, load):
    for path in (tree / "train/cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ResfastError, match=r"class 'cat' in \S+train/cat has only corrupt images"):
        load(tree, skip_corrupt=True)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [SIZE * SIZE - 1, 10])  # a warning, an error to Pillow
def test_a_decompression_bomb_is_a_corrupt_image(tree, load, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ResfastError, match=r"test/cat/0\.png is not a readable.* limit of"):
        load(tree)


def test_images_too_large_for_memory_are_an_error(tree, load, monkeypatch):
    def refuse(*args):
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(ResfastError, match="GiB of memory"):
        load(tree)


def test_an_archive_that_changes_while_read_is_an_error(tree, tmp_path):
    source = folder.open_source(pack(tree, tmp_path / "a.tar"))
    listing = source.scan()
    shutil.rmtree(tree / "train/cat")
    pack(tree, tmp_path / "a.tar")
    with pytest.raises(ResfastError, match="changed while it was read"):
        folder.read(source, listing, SIZE, False, lambda line: None)


@pytest.mark.parametrize("size", [7, 0, -1, 1025])
def test_an_image_size_out_of_range_is_an_error(tree, load, size):
    with pytest.raises(ResfastError, match=f"image size {size} is out of range") as error:
        load(tree, image_size=size)
    one_sentence(error)


def test_unknown_data_is_an_error_with_the_choices_and_the_nearest(tmp_path):
    with pytest.raises(ResfastError, match=r"'cifar-10'.*digits.*did you mean 'cifar10'"):
        load_dataset("cifar-10", data_dir=tmp_path)
    with pytest.raises(ResfastError, match=f"did you mean 'folder:{tmp_path}'"):
        load_dataset(str(tmp_path), data_dir=tmp_path)


# --- the cache -------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Grows by one for each image decoded."""
    count: list[int] = []
    original = decode.decode_image

    def counting(data, size):
        count.append(1)
        return original(data, size)

    monkeypatch.setattr(decode, "decode_image", counting)
    return count


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "data/cache").iterdir())


@pytest.mark.parametrize("packed", [False, True])
def test_a_cached_set_is_not_decoded_again(tree, load, lines, tmp_path, decoded, packed):
    path = pack(tree, tmp_path / "a.tar") if packed else tree
    first = load(path)
    assert len(decoded) == 10
    assert any("cached as" in line for line in lines)
    lines.clear()
    assert same(first, load(path))
    assert len(decoded) == 10
    assert lines == []
    assert len(cache_files(tmp_path)) == 1


def test_the_cache_follows_the_content_not_the_path(tree, load, tmp_path, decoded):
    first = load(tree)
    moved = load(tree.rename(tmp_path / "moved"))
    assert len(decoded) == 10
    assert moved.name == f"folder:{tmp_path / 'moved'}"
    assert same(first, moved)


def change_bytes(tree):
    add(tree, "test/dog/1.png", encode(make_image(seed=99)))


def rename_file(tree):
    (tree / "train/cat/0.png").rename(tree / "train/cat/9.png")


def move_to_other_class(tree):
    (tree / "train/cat/0.png").rename(tree / "train/dog/9.png")


@pytest.mark.parametrize("change", [change_bytes, rename_file, move_to_other_class])
def test_the_cache_key_changes_with_the_content(tree, load, tmp_path, decoded, change):
    first = load(tree)
    change(tree)
    second = load(tree)
    assert len(decoded) == 20
    assert first.digest != second.digest
    assert len(cache_files(tmp_path)) == 2


def test_the_cache_key_changes_with_the_options(tree, load, decoded):
    load(tree)
    load(tree, image_size=8)
    load(tree, skip_corrupt=True)
    assert len(decoded) == 30


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_header(path):
    path.write_bytes(path.read_bytes()[:20])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def empty(path):
    path.write_bytes(b"")


def other_shapes(path):
    from safetensors.torch import save_file

    zeros = torch.zeros(3, 5, 5, 3, dtype=torch.uint8)
    labels = torch.zeros(3, dtype=torch.int64)
    tensors = {f"{s}_images": zeros.clone() for s in ("train", "test")}
    tensors |= {f"{s}_labels": labels.clone() for s in ("train", "test")}
    metadata = {"classes": '["cat"]', "skipped": "[]"}
    metadata["digest"] = dataset.tensor_digest(tensors, ("cat",))
    save_file(tensors, path, metadata)


def no_metadata(path):
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path.with_suffix(".x"))
    os.replace(path.with_suffix(".x"), path)


@pytest.mark.parametrize(
    "damage", [truncate, cut_in_header, flip_a_bit, empty, other_shapes, no_metadata]
)
def test_a_damaged_cache_is_reported_once_and_made_again(
    tree, load, lines, tmp_path, decoded, damage
):
    digest = load(tree).digest
    (file,) = cache_files(tmp_path)
    damage(file)
    lines.clear()
    again = load(tree)
    assert again.digest == digest
    assert len(decoded) == 20
    assert sum("cannot be used" in line for line in lines) == 1
    lines.clear()
    load(tree)
    assert len(decoded) == 20
    assert lines == []


def test_a_half_written_cache_is_never_read(tree, load, tmp_path, monkeypatch, decoded):
    def cut_short(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", cut_short)
        with pytest.raises(KeyboardInterrupt):
            load(tree)
    assert cache_files(tmp_path) == []
    load(tree)
    assert len(decoded) == 20


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_reported_once(
    tree, load, lines, tmp_path, monkeypatch, code
):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    assert len(load(tree).train_labels) == 6
    assert sum("not cached" in line for line in lines) == 1
    assert cache_files(tmp_path) == []


def test_a_cache_folder_that_cannot_be_made_is_reported_once(tree, load, lines, tmp_path):
    add(tmp_path, "data", b"a file where the folder should be")
    assert len(load(tree).train_labels) == 6
    assert sum("not cached" in line for line in lines) == 1


def test_two_preparations_at_once_leave_one_good_cache(tree, load, tmp_path, decoded):
    results = []
    threads = [threading.Thread(target=lambda: results.append(load(tree))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(same(results[0], other) for other in results)
    assert [path.suffix for path in cache_files(tmp_path)] == [".safetensors"]
    decoded.clear()
    assert same(results[0], load(tree))
    assert not decoded


def test_temporary_files_older_than_a_day_are_removed(tree, load, tmp_path):
    old = add(tmp_path, "data/cache/.x.safetensors.1.ab.tmp", b"x")
    new = add(tmp_path, "data/cache/.y.safetensors.1.ab.tmp", b"x")
    os.utime(old, (0, 0))
    load(tree)
    assert not old.exists()
    assert new.exists()


# --- atomic writing --------------------------------------------------------------------------


def test_write_bytes_replaces_the_file(tmp_path):
    path = tmp_path / "file"
    for data in (b"one", memoryview(b"two")):
        atomic.write_bytes(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_write_bytes_on_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path, monkeypatch, function
):
    path = add(tmp_path, "file", b"old")

    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_bytes_that_stops_midway_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = add(tmp_path, "file", b"old")

    def half(self, data):
        with open(self, "wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_bytes_into_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic.write_bytes(tmp_path / "no" / "file", b"new")


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(descriptor):
        if os.fstat(descriptor).st_mode & 0o040000:
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    atomic.write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


# --- CIFAR, digits and auto ------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch) -> list[str]:
    """No host is reachable; the URLs asked for are kept."""
    asked: list[str] = []

    def refuse(request, *args, **options):
        asked.append(request.full_url)
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return asked


@pytest.fixture
def tiny_cifar(tmp_path, monkeypatch):
    """Gives torchvision's CIFAR-10 batches of four images and puts them on disk, packed or not."""
    from torchvision.datasets import CIFAR10

    source = tmp_path / "source" / CIFAR10.base_folder

    def batch(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        add(source, name, data)
        return [name, hashlib.md5(data).hexdigest()]

    rng = np.random.default_rng(0)
    lists = {
        names: [
            batch(f"{names}_{i}", {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8),
                                   "labels": [0, 1, 2, 3]})
            for i in range(2)
        ]
        for names in ("train_list", "test_list")
    }  # fmt: skip
    meta = batch("batches.meta", {"label_names": list("abcd")})
    archive = tmp_path / "source" / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "train_list", lists["train_list"])
    monkeypatch.setattr(CIFAR10, "test_list", lists["test_list"])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta[1]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())

    def place(kind: str) -> Path:
        data_dir = tmp_path / "data"
        data_dir.mkdir()
        if kind == "unpacked":
            shutil.copytree(source, data_dir / CIFAR10.base_folder)
        else:
            shutil.copy(archive, data_dir)
        return data_dir

    return place


@pytest.mark.parametrize("data", ["auto", "cifar10"])
@pytest.mark.parametrize("kind", ["unpacked", "archive"])
def test_cifar10_on_disk_is_used_without_the_network(
    tiny_cifar, offline, lines, data, kind, capsys
):
    loaded = load_dataset(data, data_dir=tiny_cifar(kind), report=lines.append)
    assert loaded.name == "cifar10"
    assert loaded.train_images.shape == (8, 32, 32, 3)
    assert loaded.train_images.is_contiguous()
    assert loaded.train_images.dtype == torch.uint8
    assert loaded.test_labels.tolist() == [0, 1, 2, 3] * 2
    assert loaded.classes == tuple("abcd")
    assert offline == []
    assert capsys.readouterr().out == ""


def test_cifar10_is_resized_on_request(tiny_cifar, offline):
    loaded = load_dataset("cifar10", data_dir=tiny_cifar("unpacked"), image_size=24)
    assert loaded.train_images.shape == (8, 24, 24, 3)


def test_a_damaged_cifar_archive_is_an_error_that_names_it(tiny_cifar, offline, lines):
    data_dir = tiny_cifar("archive")
    truncate(data_dir / "cifar-10-python.tar.gz")
    with pytest.raises(ResfastError, match=r"cifar-10-python\.tar\.gz is truncated") as error:
        load_dataset("cifar10", data_dir=data_dir)
    one_sentence(error)
    assert load_dataset("auto", data_dir=data_dir, report=lines.append).name == "digits"
    assert "truncated" in lines[0]
    assert offline == []


def test_a_damaged_cifar_batch_is_an_error_that_names_it(tiny_cifar, offline):
    data_dir = tiny_cifar("unpacked")
    truncate(data_dir / "cifar-10-batches-py/test_list_1")
    with pytest.raises(ResfastError, match="test_list_1 is missing or damaged"):
        load_dataset("cifar10", data_dir=data_dir)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_that_cannot_be_fetched_is_an_error_with_remedies(tmp_path, offline, name):
    with pytest.raises(ResfastError, match="Name or service not known") as error:
        load_dataset(name, data_dir=tmp_path)
    text = one_sentence(error)
    assert len(offline) == 1
    assert all(s in text for s in (offline[0], str(tmp_path), "--data folder:", "--data digits"))


@pytest.mark.parametrize(("code", "usable"), [(404, False), (503, False), (405, True)])
def test_a_server_that_refuses_the_file_is_told_from_one_that_refuses_the_question(
    monkeypatch, code, usable
):
    def answer(request, *args, **options):
        raise urllib.error.HTTPError(request.full_url, code, "No", {}, None)

    monkeypatch.setattr("urllib.request.urlopen", answer)
    assert (download.unreachable("https://example.invalid/x") == "") is usable


def test_a_host_whose_name_is_never_resolved_does_not_hang(monkeypatch):
    release = threading.Event()

    def hang(*args, **options):
        release.wait(30)
        raise OSError

    monkeypatch.setattr("urllib.request.urlopen", hang)
    monkeypatch.setattr(download, "REACHABLE_TIMEOUT_S", -0.9)
    assert "did not answer" in download.unreachable("https://example.invalid/x")
    release.set()


def test_a_download_cut_short_leaves_no_archive(tmp_path, monkeypatch, lines):
    def cut(url, root, filename, md5):
        add(Path(root), filename, b"half")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(download, "unreachable", lambda url: "")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", cut)
    with pytest.raises(ResfastError, match="not found or corrupted"):
        load_dataset("cifar10", data_dir=tmp_path / "data", report=lines.append)
    assert list((tmp_path / "data").iterdir()) == []
    assert any("downloading" in line for line in lines)


def test_a_download_is_unpacked_and_read(tmp_path, tiny_cifar, monkeypatch, lines):
    stored = tiny_cifar("archive") / "cifar-10-python.tar.gz"

    def fetch(url, root, filename, md5):
        shutil.copy(stored, Path(root) / filename)

    monkeypatch.setattr(download, "unreachable", lambda url: "")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    loaded = load_dataset("auto", data_dir=tmp_path / "new", report=lines.append)
    assert loaded.name == "cifar10"
    assert (tmp_path / "new/cifar-10-python.tar.gz").exists()


def test_auto_without_cifar10_says_so_in_one_line_and_uses_digits(tmp_path, offline, lines):
    data = load_dataset("auto", data_dir=tmp_path, report=lines.append)
    assert data.name == "digits"
    (line,) = lines
    assert "\n" not in line
    assert all(s in line for s in ("CIFAR-10", "Name or service not known", "digits", "--data"))


def test_digits_are_rgb_split_by_class_and_always_the_same(tmp_path):
    data = load_dataset("digits", data_dir=tmp_path)
    assert data.train_images.shape == (1438, 32, 32, 3)
    assert data.test_images.shape == (359, 32, 32, 3)
    assert data.train_images.dtype == torch.uint8
    assert data.train_images.is_contiguous()
    assert torch.equal(data.train_images[..., 0], data.train_images[..., 2])
    assert data.train_images.max() == 255
    assert data.classes == tuple("0123456789")
    counts = torch.bincount(data.test_labels)
    assert counts.min() >= 34
    assert counts.max() <= 37
    assert data.digest == load_dataset("digits", data_dir=tmp_path).digest
    assert load_dataset("digits", data_dir=tmp_path, image_size=8).test_images.shape[1] == 8
    assert not list(tmp_path.iterdir())


def test_importing_the_reader_imports_no_heavy_library():
    code = (
        "import sys, resfast.data.sources as d; "
        "print([m for m in ('sklearn', 'torchvision', 'PIL') if m in sys.modules])"
    )
    root = Path(sources.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- splits and statistics -------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=4, max_size=200),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**31),
)
def test_a_validation_split_is_a_stratified_partition_fixed_by_its_seed(labels, fraction, seed):
    labels = torch.tensor(labels)
    if not 0 < round(len(labels) * fraction) < len(labels):
        with pytest.raises(ResfastError, match="leaves training or validation empty"):
            split_validation(labels, fraction, seed)
        return
    train, val = split_validation(labels, fraction, seed)
    assert train.dtype == val.dtype == torch.int64
    assert torch.cat([train, val]).sort().values.tolist() == list(range(len(labels)))
    assert train.tolist() == sorted(train.tolist())
    assert val.tolist() == sorted(val.tolist())
    assert len(val) == round(len(labels) * fraction)
    for label in labels.unique():
        share = (labels == label).sum() * fraction
        assert abs((labels[val] == label).sum() - share) < 1 + 1e-4
    again = split_validation(labels, fraction, seed)
    assert torch.equal(train, again[0])
    assert torch.equal(val, again[1])


def test_another_seed_gives_another_split():
    labels = torch.arange(1000) % 10
    assert not torch.equal(split_validation(labels, 0.1, 0)[1], split_validation(labels, 0.1, 1)[1])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan"), 1e-6, 1 - 1e-6])
def test_a_split_with_an_empty_part_is_an_error(fraction):
    with pytest.raises(ResfastError, match="validation fraction") as error:
        split_validation(torch.arange(100) % 10, fraction, 0)
    one_sentence(error)


def test_channel_mean_and_std_equal_those_of_numpy_in_float64():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (400, 32, 32, 3), dtype=np.uint8)  # more than one chunk
    mean, std = channel_mean_std(torch.from_numpy(images))
    pixels = images.astype(np.float64) / 255
    assert mean.dtype == std.dtype == torch.float32
    np.testing.assert_allclose(mean.numpy(), pixels.mean((0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(std.numpy(), pixels.std((0, 1, 2)), rtol=1e-7)


@pytest.mark.parametrize("value", [0, 37, 255])
def test_the_std_of_a_constant_is_exactly_zero(value):
    mean, std = channel_mean_std(torch.full((5, 8, 8, 3), value, dtype=torch.uint8))
    assert std.tolist() == [0, 0, 0]
    np.testing.assert_allclose(mean.numpy(), value / 255, rtol=1e-7)


@pytest.mark.parametrize("images", [torch.zeros(2, 8, 8, 3), torch.zeros(0, 8, 8, 3).byte()])
def test_images_without_a_mean_are_an_error(images):
    with pytest.raises(ResfastError, match="expected uint8"):
        channel_mean_std(images)
