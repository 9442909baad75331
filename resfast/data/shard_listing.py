"""Lists the samples of WebDataset shards, whoever wrote them, without reading their images.

A sample is an image and its class. Both are members of the archive with the same name up to the
extension; for names such as ``KEY.image.jpg`` with ``KEY.label.cls``, up to the first dot, as in
the webdataset package. They need not be next to each other. The class is the content of
``KEY.cls``, a field of ``KEY.json`` or the content of ``KEY.txt``: an index, or a name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor

from resfast import atomic
from resfast.data.dataset import MAX_CLASSES
from resfast.data.folder import IMAGE_SUFFIXES, StrictTarInfo
from resfast.errors import ResfastError, nearest

IMAGE_EXTENSIONS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
LABEL_EXTENSIONS = ("cls", "json", "txt")
"""What holds the class of a sample, the first that there is."""
JSON_FIELDS = ("cls", "class", "label", "target", "class_name", "label_name")
"""Fields of ``KEY.json`` that hold the class, the first that there is."""
_MOST_LABEL_BYTES = {"cls": 256, "json": 2**20, "txt": 256}
_BLOCK = 512
_FORMAT = 2


class Part(NamedTuple):
    """A member of an archive: its place in bytes and its name."""

    extension: str
    offset: int
    size: int
    name: str


@dataclass(frozen=True)
class Listing:
    """The samples of a shard.

    Attributes:
        images: the images, in the order of the archive.
        labels: the text of the class of each.
    """

    images: tuple[Part, ...]
    labels: tuple[str, ...]

    def index_lines(self) -> list[str]:
        """The lines of an index of the images in the format of DALI's ``wds2idx``, version 1.2."""
        lines = [
            f"{part.extension} {part.offset} {part.size} {index_name(part)}\n"
            for part in self.images
        ]
        return [f"v1.2 {len(lines)}\n", *lines]


def index_name(part: Part) -> str:
    """The name of a member in an index, where it ends at a space."""
    return quote(part.name, safe="/()[]{}+,;=@!$&'*~:")


def source_name(path: str, part: Part) -> str:
    """What DALI calls a sample in its ``source_info``."""
    return f"{path}:{part.offset}:{index_name(part)}"


def list_shard(path: Path, cache: Path | None = None) -> Listing:
    """The samples of a shard; listed once per process and content.

    Args:
        path: the shard, an uncompressed tar archive.
        cache: folder in which listings are kept for other processes, if any.

    Raises:
        ResfastError: the shard is missing, unreadable or compressed, has no sample, has a member
            twice, or a sample lacks its image or its class.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise ResfastError(f"the shard {path} does not exist: check its name") from error
    return _listed(os.path.abspath(path), status.st_size, status.st_mtime_ns, cache, path)


@functools.lru_cache(maxsize=4096)
def _listed(path: str, size: int, changed: int, cache: Path | None, shown: Path) -> Listing:
    stored = None
    if cache is not None:
        key = hashlib.blake2b(f"{_FORMAT} {path} {size} {changed}".encode(), digest_size=12)
        stored = cache / f"shard-{key.hexdigest()}.json"
        found = _load(stored, size)
        if found is not None:
            return found
    parts = _indexed_parts(Path(path), size)
    listing = _samples(list(members(Path(path), shown)) if parts is None else parts, path, shown)
    if stored is not None:
        content = json.dumps(asdict(listing), separators=(",", ":"))
        try:
            stored.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(stored, content.encode())
        except OSError:
            pass  # listed again next time
    return listing


def _load(stored: Path, size: int) -> Listing | None:
    """A listing that was kept, or None where there is none or it is damaged."""
    try:
        content = json.loads(stored.read_bytes())
        images = tuple(Part(str(e), int(o), int(s), str(n)) for e, o, s, n in content["images"])
        labels = tuple(map(str, content["labels"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    inside = all(_BLOCK <= part.offset <= size - part.size for part in images)
    return Listing(images, labels) if inside and 0 < len(images) == len(labels) else None


# -- members ---------------------------------------------------------------------------------------


def members(path: Path, shown: Path) -> Iterator[Part]:
    """The files in an archive, by its headers; a hard link has the place of its file.

    Raises:
        ResfastError: it is no uncompressed archive, it is cut or damaged, or cannot be read.
    """
    found: dict[str, tuple[int, int]] = {}
    begun = False
    try:
        with tarfile.open(path, "r:", tarinfo=StrictTarInfo) as tar:
            begun = True
            for member in tar:
                place = (member.offset_data, member.size)
                if member.islnk():
                    if member.linkname not in found:
                        raise ResfastError(
                            f"{shown} has the member {member.name!r}, a link to "
                            f"{member.linkname!r}, which is no file before it: pack it again"
                        )
                    place = found[member.linkname]
                elif not member.isfile():
                    continue
                found[member.name] = place
                yield Part(member.name.rpartition(".")[2].lower(), *place, member.name)
    except tarfile.TarError as error:
        raise ResfastError(
            f"{shown} is cut off or damaged ({error}): copy it or write it again"
            if begun
            else f"{shown} is not an uncompressed tar archive ({error}): shards are read in place, "
            "so decompress it first"
        ) from error
    except OSError as error:
        raise ResfastError(f"{shown} cannot be read ({error.strerror or error})") from error


def _indexed_parts(path: Path, size: int) -> list[Part] | None:
    """The files in an archive by the index next to it, or None unless it is right in every respect.

    That is so for an index written by :func:`resfast.data.shards.write_shards`: the files of the
    index follow each other from the beginning to the end of the archive, and their headers agree.
    """
    try:
        lines = path.with_suffix(".idx").read_text().splitlines()
        version, count = lines[0].split(" ")
        fields = [line.split(" ") for line in lines[1:]]
        if version != "v1.2" or int(count) != len(fields) or any(len(f) % 4 for f in fields):
            return None
        parts = [
            Part(f[i].lower(), int(f[i + 1]), int(f[i + 2]), f[i + 3])
            for f in fields
            for i in range(0, len(f), 4)
        ]
        parts.sort(key=lambda part: part.offset)
        end = 0
        with open(path, "rb") as file:
            for part in parts:
                if part.offset != end + _BLOCK or not 0 <= part.size <= size - part.offset:
                    return None
                header = os.pread(file.fileno(), _BLOCK, end)
                name, bytes_, kind = header[:100].rstrip(b"\0"), header[124:136], header[156:157]
                if (
                    name != part.name.encode()
                    or int(bytes_.rstrip(b"\0 "), 8) != part.size
                    or kind not in (b"0", b"\0")
                ):
                    return None
                end = part.offset + -(-part.size // _BLOCK) * _BLOCK
            return parts if not os.pread(file.fileno(), _BLOCK, end).strip(b"\0") else None
    except (OSError, ValueError, IndexError):
        return None


# -- samples ---------------------------------------------------------------------------------------


def _samples(parts: Sequence[Part], path: str, shown: Path) -> Listing:
    """The samples among the files of an archive.

    Raises:
        ResfastError: see :func:`list_shard`.
    """
    groups = _grouped(parts, shown)
    if not groups:
        raise ResfastError(f"{shown} has no samples: expected KEY.jpg with KEY.cls")
    images, labels = [], []
    with open(path, "rb") as file:
        for key, group in groups.items():
            image = next((group[e] for e in IMAGE_EXTENSIONS if e in group), None)
            found = [group[e] for e in LABEL_EXTENSIONS if e in group]
            if image is None or not found:
                missing = (
                    f"image {key}.{'|'.join(IMAGE_EXTENSIONS)}" if image is None else f"{key}.cls"
                )
                raise ResfastError(
                    f"{shown} has no {missing}: each sample needs an image and its class, as "
                    "KEY.cls, KEY.json or KEY.txt"
                )
            images.append(image)
            labels.append(_label(found, functools.partial(os.pread, file.fileno()), shown))
    return Listing(tuple(images), tuple(labels))


def _grouped(parts: Iterable[Part], shown: Path) -> dict[str, dict[str, Part]]:
    """Files by the key of their sample and extension, in the order of the archive."""
    groups: dict[str, dict[str, Part]] = {}
    for part in parts:
        folder, slash, name = part.name.rpartition("/")
        stem, _, _ = name.rpartition(".")
        if part.extension not in (*IMAGE_EXTENSIONS, *LABEL_EXTENSIONS) or not stem:
            continue
        if name.startswith("._"):  # what macOS adds
            continue
        _put(groups, f"{folder}{slash}{stem}", part, shown)
    # What is not whole by the last dot may be so by the first one.
    incomplete = [key for key, group in groups.items() if not _is_whole(group)]
    whole = set(groups) - set(incomplete)
    for key in incomplete:
        folder, slash, stem = key.rpartition("/")
        first = f"{folder}{slash}{stem.partition('.')[0]}"
        if first == key or not stem.partition(".")[0]:
            continue
        for part in groups.pop(key).values():
            if first not in whole:  # otherwise it is something else about that sample
                _put(groups, first, part, shown)
    return groups


def _put(groups: dict[str, dict[str, Part]], key: str, part: Part, shown: Path) -> None:
    group = groups.setdefault(key, {})
    if part.extension in group:
        other = group[part.extension].name
        twice = f"{part.name} twice" if other == part.name else f"both {other} and {part.name}"
        raise ResfastError(
            f"{shown} has {twice}: each sample needs a key of its own, so rename one or remove it"
        )
    group[part.extension] = part


def _is_whole(group: dict[str, Part]) -> bool:
    return not (
        group.keys().isdisjoint(IMAGE_EXTENSIONS) or group.keys().isdisjoint(LABEL_EXTENSIONS)
    )


def _label(parts: Sequence[Part], read: Callable[[int, int], bytes], shown: Path) -> str:
    """The text of a class, from the first of some files that has one."""
    for part in parts:
        last = part is parts[-1]
        most = _MOST_LABEL_BYTES[part.extension]
        if not 0 < part.size <= most:
            if not last:
                continue
            raise ResfastError(
                f"{part.name} in {shown} has {part.size:,} bytes; expected a class index or "
                f"name of at most {most:,}"
            )
        data = read(part.size, part.offset)
        try:
            text = data.decode()
            found = (_field(json.loads(text)) if part.extension == "json" else text.strip()) or None
        except (ValueError, RecursionError) as error:
            raise ResfastError(
                f"{part.name} in {shown} cannot be read ({error}); expected "
                + ("JSON" if part.extension == "json" else "the class as UTF-8 text")
            ) from error
        if found is not None:
            return found
        if last:
            where = f"one of the fields {', '.join(JSON_FIELDS)}, " * (part.extension == "json")
            raise ResfastError(
                f"{part.name} in {shown} has no class; expected {where}a number or a name"
            )
    raise AssertionError("a sample has a file with its class")


def _field(content: Any) -> str | None:
    """The class in the JSON of a sample."""
    if not isinstance(content, dict):
        return str(content) if type(content) is int else None
    for field in JSON_FIELDS:
        value = content.get(field)
        if type(value) is int or isinstance(value, str):
            return str(value).strip()
    return None


# -- classes ---------------------------------------------------------------------------------------


def class_names(listings: Iterable[tuple[str, Listing]]) -> tuple[str, ...]:
    """The classes of shards that come without a list of them, by path and listing.

    Names are sorted; numbers count from 0.

    Raises:
        ResfastError: some samples have numbers and others names, or hardly two have the same name.
    """
    first: dict[bool, str] = {}
    texts: set[str] = set()
    count = 0
    for path, listing in listings:
        for part, text in zip(listing.images, listing.labels, strict=True):
            first.setdefault(_is_number(text), f"{text!r} ({part.name} in {path})")
        texts.update(listing.labels)
        count += len(listing.labels)
    if len(first) == 2:
        raise ResfastError(
            f"some samples have a number as their class, such as {first[True]}, and others a name, "
            f"such as {first[False]}: name the classes with --classes FILE"
        )
    if True in first:
        most = max(map(int, texts))
        if most >= MAX_CLASSES:
            raise ResfastError(
                f"the shards have the class {most:,} among {len(texts):,} different ones; expected "
                f"numbers from 0 to at most {MAX_CLASSES - 1:,}: number the classes from 0"
            )
        return tuple(map(str, range(most + 1)))
    if len(texts) > max(100, count // 2):
        raise ResfastError(
            f"{count:,} samples have {len(texts):,} different classes, such as {first[False]}: "
            "text like that is no class; give each sample a KEY.cls"
        )
    return tuple(sorted(texts))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def label_indices(path: str, listing: Listing, names: Sequence[str], classes: int) -> Tensor:
    """The class of each sample of a shard, int64 ``[N]``.

    Args:
        path: the shard.
        listing: its samples.
        names: names of the classes; may be empty.
        classes: their number.

    Raises:
        ResfastError: a class that is neither a name nor a number below ``classes``.
    """
    index_of = {name: index for index, name in enumerate(names)}
    found = []
    for part, text in zip(listing.images, listing.labels, strict=True):
        index = index_of.get(text)
        if index is None:
            index = int(text) if _is_number(text) else classes
            if index >= classes:
                also = " or the name of a class" + nearest(text, names) if names else ""
                raise ResfastError(
                    f"the sample {source_name(path, part)} has the class {text!r}; expected a "
                    f"number from 0 to {classes - 1}{also}"
                )
        found.append(index)
    return torch.tensor(found, dtype=torch.int64)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names from a file: a JSON list, or text with a name per line.

    Raises:
        ResfastError: the file cannot be read, has no name, or has one twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows puts a mark at the beginning
        content = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise ResfastError(f"--classes {path} cannot be read ({error})") from error
    if isinstance(content, dict):
        content = content.get("classes")
    if not (isinstance(content, list) and all(isinstance(name, str) for name in content)):
        raise ResfastError(f"--classes {path} has no list of names: expected one name per line")
    names = [name.strip() for name in content]
    while names and not names[-1]:
        names.pop()
    twice = [name for name, count in Counter(names).items() if count > 1 or not name]
    if not names or twice:
        what = f"the name {twice[0]!r} twice" if twice and twice[0] else "a line without a name"
        raise ResfastError(
            f"--classes {path} has {what if names else 'no names'}: expected one name per line"
        )
    return tuple(names)
