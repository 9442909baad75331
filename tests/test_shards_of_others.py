"""WebDataset shards that others wrote, and ours in the hands of others."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resfast.data import shard_listing
from resfast.data.augment import Augment
from resfast.data.dataset import Stream
from resfast.data.shards import read_shards, write_shards
from resfast.data.sources import open_data
from resfast.errors import ResfastError

pytest.importorskip("nvidia.dali", reason="needs nvidia-dali-cuda130")

from resfast.data.dali import DaliLoader

Members = Sequence[tuple[str, bytes]]


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(*labels: bytes, key: str = "{}", extension: str = "cls") -> Members:
    """Samples whose images have the values 0, 10, …"""
    members = []
    for row, label in enumerate(labels):
        name = key.format(row)
        members += [(f"{name}.png", png(10 * row % 256)), (f"{name}.{extension}", label)]
    return members


def opened(folder: Path, data_dir: Path, classes: Path | None = None) -> Stream:
    stream = open_data(
        f"shards:{folder}",
        data_dir=data_dir,
        image_size=8,
        report=lambda line: None,
        classes=classes,
    )
    assert isinstance(stream, Stream)
    return stream


def read(stream: Stream) -> list[tuple[int, str]]:
    """Value of the image and name of the class of each test sample."""
    loader = DaliLoader(
        stream.test,
        batch_size=4,
        image_size=8,
        mean=torch.zeros(3),
        std=torch.ones(3),
        augment=Augment(),
        classes=len(stream.classes),
        train=False,
        finish="uint8",
        threads=1,
    )
    return [
        (int(value), stream.classes[label])
        for batch in loader.epoch(0)
        for value, label in zip(batch.images[:, 0, 0, 0], batch.labels, strict=True)
    ]


NAMED = [(0, "cat"), (10, "dog"), (20, "cat")]
NUMBERED = [(0, "0"), (10, "1"), (20, "0")]
LONG = "a folder of many/" * 9
LAYOUTS: dict[str, tuple[Members, list[tuple[int, str]]]] = {
    "class names": (samples(b"cat", b"dog\n", b"cat"), NAMED),
    "class numbers": (samples(b"0", b"1\n", b" 0 "), NUMBERED),
    "JSON beside": (
        samples(
            b'{"label": "cat"}', b'{"a": 1, "label": "dog"}', b'{"cls": "cat"}', extension="json"
        ),
        NAMED,
    ),
    "JSON without a class, and text": (
        [
            *samples(b"cat", b"dog", b"cat", extension="txt"),
            *((f"{i}.json", b"{}") for i in range(3)),
        ],
        NAMED,
    ),
    "a number as JSON": (samples(b"0", b"1", b"0", extension="json"), NUMBERED),
    "a caption beside a class": (
        [
            *samples(b"0", b"1", b"0"),
            *((f"{i}.txt", b"a photo of " + b"x" * 999) for i in range(3)),
        ],
        NUMBERED,
    ),
    "spaces": (samples(b"0", b"1", b"0", key="my photo {}"), NUMBERED),
    "dots": (samples(b"0", b"1", b"0", key="v1.2.img.{}"), NUMBERED),
    "percent signs and other characters": (samples(b"0", b"1", b"0", key="100%20é#{}"), NUMBERED),
    "folders": (samples(b"0", b"1", b"0", key="./a/b.c/{}"), NUMBERED),
    "long names": (samples(b"0", b"1", b"0", key=LONG + "{}"), NUMBERED),
    "upper case": (
        [(name.upper(), data) for name, data in samples(b"0", b"1", b"0", key="img{}")],
        NUMBERED,
    ),
    "members of a sample apart": (
        sorted(samples(b"0", b"1", b"0"), key=lambda member: member[0].rpartition(".")[2])[::-1],
        NUMBERED,
    ),
    "extensions of two parts": (
        [
            (f"{i}.{suffix}", data)
            for i, label in enumerate((b"0", b"1", b"0"))
            for suffix, data in (("image.png", png(10 * i)), ("target.cls", label))
        ],
        NUMBERED,
    ),
    "another image beside": (
        [*samples(b"0", b"1", b"0"), *((f"{i}.mask.png", png(255)) for i in range(3))],
        NUMBERED,
    ),
    "other files": (
        [
            ("README", b"x"),
            ("._0.png", b"x"),
            (".png", b""),
            *samples(b"0", b"1", b"0"),
            ("a.b", b""),
        ],
        NUMBERED,
    ),
}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_without_a_list_of_classes_are_read(name: str, format: int, tmp_path: Path):
    members, expected = LAYOUTS[name]
    for split in ("train", "test"):
        write(tmp_path / "shards" / f"data-{split}-000.tar", members, format)
    stream = opened(tmp_path / "shards", tmp_path)
    assert sorted(read(stream)) == expected
    assert len(stream.train) == 3


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-0.tar", "test-0.tar"),
        ("imagenet-train-000000.tar", "imagenet-val-000000.tar"),
        ("train/0.tar", "val/0.tar"),
        ("Training/0.tar", "VALID_0.tar"),
        ("train/a/b/0.tar", "test/part of train/test/0.tar"),
    ],
)
def test_names_of_shards_say_the_split(train: str, test: str, tmp_path: Path):
    write(tmp_path / "s" / train, samples(b"0", b"1"))
    write(tmp_path / "s" / test, samples(b"1"))
    stream = opened(tmp_path / "s", tmp_path)
    assert (len(stream.train), len(stream.test)) == (2, 1)
    assert stream.classes == ("0", "1")


def test_test_shards_come_before_those_for_validation(tmp_path: Path):
    lines: list[str] = []
    for name, count in (("train-0", 3), ("val-0", 2), ("test-0", 1), ("extra", 1)):
        write(tmp_path / f"{name}.tar", samples(*[b"0"] * count))
    found = read_shards(tmp_path, report=lines.append)
    assert (found.train.count, found.test.count) == (3, 1)
    assert "not used: 1 shards whose name says no split, such as extra.tar" in lines
    assert "not used: 1 shards for validation, such as val-0.tar" in lines


@pytest.mark.parametrize(
    ("file", "content"),
    [("names.txt", "cat\ndog\nowl\n"), ("names.json", '["cat", "dog", "owl"]')],
)
@pytest.mark.parametrize("labels", [(b"cat", b"dog", b"cat"), (b"0", b"1", b"cat")])
def test_class_names_can_be_given(
    labels: tuple[bytes, ...], file: str, content: str, tmp_path: Path
):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.tar", samples(*labels))
    (tmp_path / file).write_text(content)
    stream = opened(tmp_path, tmp_path, tmp_path / file)
    assert stream.classes == ("cat", "dog", "owl")
    assert read(stream) == NAMED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no names"),
        ("a\nb\na\n", "has the name 'a' twice"),
        ("a\n\nb\n", "has a line without a name"),
        (None, "cannot be read"),
    ],
)
def test_bad_files_of_class_names_are_refused(content: str | None, message: str, tmp_path: Path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.tar", samples(b"0"))
    if content is not None:
        (tmp_path / "names.txt").write_text(content)
    with pytest.raises(ResfastError, match=rf"--classes .*names\.txt {message}"):
        opened(tmp_path, tmp_path, tmp_path / "names.txt")


def test_class_names_are_for_shards_without_their_own(image_tree: Path, tmp_path: Path):
    (tmp_path / "names.txt").write_text("left\nright\n")
    write_shards(image_tree, tmp_path / "out", report=lambda line: None)
    with pytest.raises(ResfastError, match=r"is for shards without classes\.json"):
        opened(tmp_path / "out", tmp_path, tmp_path / "names.txt")
    with pytest.raises(
        ResfastError, match="names the classes of shards:PATH, and --data is digits"
    ):
        open_data("digits", data_dir=tmp_path, classes=tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*samples(b"0"), ("0.png", png(0))], r"0\.tar has 0\.png twice"),
        ([("a/0.png", png(0)), ("a/0.PNG", png(0))], r"has both a/0\.png and a/0\.PNG"),
        (samples(b"0", b"cat"), r"such as '0' \(0\.png in .*, and others a name, such as 'cat'"),
        (samples(b"\xff"), r"0\.cls in .* cannot be read .*expected the class as UTF-8"),
        (samples(b"{", extension="json"), r"0\.json in .* cannot be read .*expected JSON"),
        (samples(b'{"a": "b"}', extension="json"), r"0\.json in .* has no class; expected one of"),
        (samples(b"x" * 300), r"0\.cls in .* has 300 bytes; expected a class index or name"),
        ([("0.png", png(0))], r"has no 0\.cls: each sample needs an image and its class"),
        (samples(b" \n"), r"0\.cls in .* has no class; expected a number or a name"),
        (samples(b'{"label": ""}', extension="json"), r"0\.json in .* has no class; expected one"),
        (samples(b"0", b"100000"), "have the class 100,000 among 2 different ones; expected num"),
    ],
)
def test_samples_that_are_not_clear_are_refused(members: Members, message: str, tmp_path: Path):
    write(tmp_path / "train-0.tar", members)
    write(tmp_path / "test-0.tar", samples(b"0"))
    with pytest.raises(ResfastError, match=message):
        opened(tmp_path, tmp_path)


def test_captions_are_no_classes(tmp_path: Path):
    for split in ("train", "test"):
        members = samples(*(f"{split} {row}".encode() for row in range(60)), extension="txt")
        write(tmp_path / f"{split}.tar", members)
    with pytest.raises(ResfastError, match="120 samples have 120 different classes, such as"):
        opened(tmp_path, tmp_path)


def test_shards_whose_split_is_unknown_are_refused(tmp_path: Path):
    write(tmp_path / "a.tar", samples(b"0"))
    with pytest.raises(ResfastError, match=r"has no training shards \(found a\.tar and 0 others\)"):
        read_shards(tmp_path)
    write(tmp_path / "train-0.tar", samples(b"0"))
    with pytest.raises(ResfastError, match="has no test shards"):
        read_shards(tmp_path, report=lambda line: None)


def test_a_class_that_is_not_known_is_named_with_a_near_one(image_tree: Path, tmp_path: Path):
    write_shards(image_tree, tmp_path, report=lambda line: None)
    write(
        tmp_path / "test-00000.tar",
        [*samples(b"left", b"1"), ("9.png", png(0)), ("9.cls", b"rigth")],
    )
    listing = json.loads((tmp_path / "classes.json").read_text())
    listing["counts"]["test"] = 3
    (tmp_path / "classes.json").write_text(json.dumps(listing))
    with pytest.raises(ResfastError, match=r":9\.png has the class 'rigth'; .*mean 'right'\?"):
        read(opened(tmp_path, tmp_path))


def test_counts_that_disagree_are_refused(image_tree: Path, tmp_path: Path):
    write_shards(image_tree, tmp_path, report=lambda line: None)
    listing = json.loads((tmp_path / "classes.json").read_text())
    listing["counts"]["test"] += 1
    (tmp_path / "classes.json").write_text(json.dumps(listing))
    with pytest.raises(ResfastError, match=r"have 16 samples; expected 17, as classes\.json says"):
        read(opened(tmp_path, tmp_path))


def test_listings_are_kept_until_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.tar", samples(b"0", b"1", b"0"))
    opened(tmp_path, tmp_path / "data")
    kept = sorted((tmp_path / "data" / "cache").iterdir())
    assert len(kept) == 2
    scans: list[Path] = []
    scan = shard_listing.members
    monkeypatch.setattr(
        shard_listing, "members", lambda path, shown: scans.append(path) or scan(path, shown)
    )
    for prepare, expected in (
        (lambda: None, []),
        (lambda: kept[0].write_text(kept[0].read_text()[:100]), [1]),
        (lambda: write(tmp_path / "test.tar", samples(b"0", b"1", b"0", b"1")), [1, 1]),
    ):
        prepare()
        shard_listing._listed.cache_clear()
        stream = opened(tmp_path, tmp_path / "data")
        assert len(scans) == len(expected)
    assert len(stream.test) == 4


def test_another_class_of_the_same_length_is_other_data(tmp_path: Path):
    digests = set()
    for labels in ((b"0", b"1", b"0"), (b"1", b"0", b"1"), (b"0", b"1", b"0")):
        for split in ("train", "test"):
            write(tmp_path / f"{split}.tar", samples(*labels))
        digests.add(opened(tmp_path, tmp_path / "data").digest)
    assert len(digests) == 2


def test_hard_links_in_shards_are_their_files(tmp_path: Path):
    for split in ("train", "test"):
        with tarfile.open(write(tmp_path / f"{split}.tar", samples(b"0", b"1")), "a") as tar:
            for name, target in (("2.png", "1.png"), ("2.cls", "0.cls")):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = tarfile.LNKTYPE, target
                tar.addfile(member)
    assert read(opened(tmp_path, tmp_path)) == [(0, "0"), (10, "1"), (10, "0")]
    with tarfile.open(tmp_path / "test.tar", "a") as tar:
        member.linkname = "gone.cls"
        tar.addfile(member)
    with pytest.raises(ResfastError, match=r"'2\.cls', a link to 'gone\.cls', which is no file"):
        opened(tmp_path, tmp_path)


SAMPLE_BYTES = 4 * 512  # an image and its class, with their headers


@pytest.mark.parametrize(
    ("length", "zeroed"),
    [
        (2 * SAMPLE_BYTES, None),
        (2 * SAMPLE_BYTES + 100, None),
        (2 * SAMPLE_BYTES + 600, None),
        (None, 2 * SAMPLE_BYTES + 148),  # in the checksum of a header
    ],
)
def test_no_sample_of_a_damaged_shard_is_left_out_silently(
    length: int | None, zeroed: int | None, tmp_path: Path
):
    for split in ("train", "test"):
        shard = write(tmp_path / f"{split}.tar", samples(*[b"0", b"1"] * 3))
    content = bytearray(shard.read_bytes()[:length])
    if zeroed is not None:
        content[zeroed : zeroed + 8] = bytes(8)
    shard.write_bytes(content)
    with pytest.raises(ResfastError, match=r"test\.tar is cut off or damaged \("):
        opened(tmp_path, tmp_path)


def test_compressed_shards_are_named(tmp_path: Path):
    (tmp_path / "train-0.tar.gz").write_bytes(b"")
    with pytest.raises(ResfastError, match=r"train-0\.tar\.gz is compressed, and shards are read"):
        read_shards(tmp_path)


def test_class_names_may_begin_with_a_byte_order_mark(tmp_path: Path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.tar", samples(b"cat", b"dog", b"cat"))
    (tmp_path / "names.txt").write_text("dog\ncat\n", encoding="utf-8-sig")
    assert opened(tmp_path, tmp_path, tmp_path / "names.txt").classes == ("dog", "cat")


def damages() -> dict[str, Callable[[str], str]]:
    def line(change: Callable[[list[str]], None]) -> Callable[[str], str]:
        def apply(text: str) -> str:
            lines = text.splitlines(keepends=True)
            fields = lines[2].split(" ")
            change(fields)
            return "".join([*lines[:2], " ".join(fields), *lines[3:]])

        return apply

    def put(place: int, value: str) -> Callable[[list[str]], None]:
        return lambda fields: fields.__setitem__(place, value)

    return {
        "empty": lambda text: "",
        "cut": lambda text: text[: len(text) // 2],
        "a line less": lambda text: "".join(text.splitlines(keepends=True)[:-1]),
        "a sample less": lambda text: "".join(
            text.replace("v1.2 16", "v1.2 15").splitlines(keepends=True)[:-1]
        ),
        "another count": lambda text: text.replace("v1.2 16", "v1.2 17"),
        "no count": lambda text: text.replace("v1.2 16", "v1.2 nonsense"),
        "another version": lambda text: text.replace("v1.2", "v9"),
        "bytes": lambda text: "\x00\x01" + text[2:],
        "offset": line(put(1, "7")),
        "negative offset": line(put(1, "-512")),
        "offset outside": line(put(1, "999999999")),
        "size": line(put(2, "1")),
        "negative size": line(put(2, "-1")),
        "size outside": line(put(2, "99999999999999999999")),
        "no number": line(put(1, "x")),
        "another name": line(put(3, "00000009.png")),
        "fields": line(lambda fields: fields.pop()),
        "of another shard": lambda text: "v1.2 1\npng 512 10 a.png cls 1536 1 a.cls\n",
    }


@pytest.mark.parametrize("name", damages())
def test_a_damaged_index_is_not_used(name: str, image_tree: Path, tmp_path: Path):
    write_shards(image_tree, tmp_path, report=lambda line: None)
    expected = read(opened(tmp_path, tmp_path))
    shard_listing._listed.cache_clear()
    index = tmp_path / "test-00000.idx"
    index.write_text(damages()[name](index.read_text()))
    assert read(opened(tmp_path, tmp_path)) == expected


def test_our_own_index_is_used(image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_shards(image_tree, tmp_path, report=lambda line: None)
    monkeypatch.setattr(shard_listing, "members", lambda path, shown: pytest.fail("scanned"))
    assert len(read(opened(tmp_path, tmp_path))) == 16


def test_shards_of_the_webdataset_package_are_read(tmp_path: Path):
    webdataset = pytest.importorskip("webdataset")
    for split in ("train", "test"):
        with webdataset.TarWriter(str(tmp_path / f"{split}-0.tar")) as sink:
            for row, (name, label) in enumerate((("cat", 1), ("dog", 0))):
                image = np.full((8, 8, 3), 10 * row, np.uint8)
                sink.write({"__key__": f"a b/{row}.x", "png": image, "cls": label, "txt": name})
    assert read(opened(tmp_path, tmp_path)) == [(0, "1"), (10, "0")]


def test_our_shards_are_read_by_the_webdataset_package(image_tree: Path, tmp_path: Path):
    webdataset = pytest.importorskip("webdataset")
    write_shards(image_tree, tmp_path, images_per_shard=100, report=lambda line: None)
    found = webdataset.WebDataset(str(tmp_path / "test-00000.tar"), shardshuffle=False)
    pairs = list(found.decode("rgb8").to_tuple("png", "cls"))
    files = sorted((image_tree / "test").glob("*/*.png"))
    assert [label for _, label in pairs] == [int(file.parent.name == "right") for file in files]
    for (image, _), file in zip(pairs, files, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(file).convert("RGB")))


def test_our_shards_are_read_by_dali_itself(image_tree: Path, tmp_path: Path):
    from nvidia.dali import fn, pipeline_def

    write_shards(image_tree, tmp_path, images_per_shard=100, report=lambda line: None)

    @pipeline_def(batch_size=16, num_threads=1, device_id=None)
    def graph():
        return tuple(
            fn.readers.webdataset(
                paths=[str(tmp_path / "test-00000.tar")],
                index_paths=[str(tmp_path / "test-00000.idx")],
                ext=["png", "cls"],
            )
        )

    pipeline = graph()
    pipeline.build()
    images, labels = pipeline.run()
    files = sorted((image_tree / "test").glob("*/*.png"))
    for row, file in enumerate(files):
        assert np.asarray(images.at(row)).tobytes() == file.read_bytes()
        assert bytes(np.asarray(labels.at(row))) == str(int(file.parent.name == "right")).encode()


def test_a_process_ends_normally_after_an_error_of_dali(tmp_path: Path):
    for split in ("train", "test"):
        broken = [("1.png", png(0)[:-30]), ("1.cls", b"0")]
        write(
            tmp_path / f"{split}-0.tar",
            [*samples(b"0"), *broken] if split == "test" else samples(b"0"),
        )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from tests.test_shards_of_others import opened, read, ResfastError\n"
        "stream = opened(Path(sys.argv[2]), Path(sys.argv[2]))\n"
        "errors = []\n"
        "for _ in range(3):\n"
        "    try:\n"
        "        read(stream)\n"
        "    except ResfastError as error:\n"
        "        errors.append(error)\n"  # with its traceback, which refers to the pipeline
        "assert [str(error).count('1.png') for error in errors] == [1, 1, 1], errors\n"
        "print('done')\n"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code, str(root), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(root))},
    )
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr
