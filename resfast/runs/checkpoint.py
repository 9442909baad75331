"""Saves and loads resumable states and weights, atomically.

``checkpoint.pt`` is the resumable state (``torch.save``, read with ``weights_only=True``);
``model.safetensors`` is the result, with the configuration, classes and normalization in its
metadata, so that this file is enough to use the network.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from resfast import atomic
from resfast.config.files import from_json, to_json
from resfast.config.schema import Config
from resfast.errors import ResfastError
from resfast.models.imported import source_digest
from resfast.runs.folder import BEST, WEIGHTS

FORMAT = 1
_CODE, _DIGEST = "network_sha256", "sha256"
"""Key of the metadata of weights that has :func:`_digest`."""
PROJECTOR = "projector"
"""Module that is part of a network during pre-training alone."""


def _write(path: Path, data: bytes | memoryview, what: str, keep: Path | None = None) -> None:
    try:
        atomic.write_bytes(path, data, keep)
    except OSError as error:
        previous = f"the previous {path} is intact" if path.exists() else "there is no previous one"
        raise ResfastError(
            f"cannot save the {what} to {path}: {error.strerror or error} ({len(data):,} bytes); "
            f"{previous}; free some space or fix the permissions, then continue with "
            f"--resume {path.parent}"
        ) from None


def save_state(path: Path, state: dict[str, Any], keep: Path | None = None) -> None:
    """Writes a resumable state; the old file is replaced only once the new one is complete.

    Args:
        path: the file.
        state: tensors and plain values.
        keep: new name of the old file; None to remove it.

    Raises:
        ResfastError: the file cannot be written (full disk, permissions); the old one is intact.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    _write(path, buffer.getbuffer(), "checkpoint", keep)


def load_state(path: Path) -> dict[str, Any]:
    """Reads a resumable state onto the CPU.

    Raises:
        ResfastError: the file is missing, damaged, or of another format.
    """
    try:
        data = path.read_bytes()
        _check_archive(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ResfastError(
            f"there is no checkpoint {path}: the run stopped before its first one, or this is not "
            "a run; start again with --config and another --name"
        ) from None
    except _UNREADABLE as error:
        raise ResfastError(
            f"checkpoint {path} cannot be read ({next(iter(str(error).splitlines()), error)}); "
            "expected a file written by resfast.train"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ResfastError(f"{path} is not a checkpoint of format {FORMAT} of resfast.train")
    return state


_UNREADABLE = (
    OSError,
    RuntimeError,  # of torch, and of zipfile for an encrypted member
    EOFError,
    ValueError,
    KeyError,
    NotImplementedError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


def _check_archive(data: bytes) -> None:
    """Compares every part of a file of ``torch.save``, a ZIP archive, with its CRC-32.

    ``torch.load`` does not, so that changed bits would become other weights.

    Raises:
        zipfile.BadZipFile: the file is damaged, or compressed, as ``torch.save`` never does.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{part.filename} is compressed")
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"it is damaged: the checksum of {damaged} is wrong")


@dataclass(frozen=True)
class Weights:
    """Contents of a weights file.

    Attributes:
        tensors: the network's state dict.
        config: the run's configuration.
        classes: class names, in the order of the logits.
        mean: channel means that the images are normalized with, float32 ``[C]`` in units of
            pixel / 255.
        std: their standard deviations, float32 ``[C]`` in the same units.
        code: :func:`~resfast.models.imported.source_digest` of the network; None for most.
    """

    tensors: dict[str, Tensor]
    config: Config
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    code: str | None = None


def save_weights(
    path: Path,
    model: nn.Module,
    config: Config,
    classes: tuple[str, ...],
    mean: Tensor,
    std: Tensor,
) -> None:
    """Writes a network's weights as safetensors, without :data:`PROJECTOR`.

    Raises:
        ResfastError: the file cannot be written; the old one is intact.
    """
    tensors: dict[str, Tensor] = {}
    storages = set()  # safetensors refuses tensors that share memory, as modules used twice do
    for name, value in model.state_dict().items():
        if name.startswith(f"{PROJECTOR}."):
            continue
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    code = source_digest(config.model.model)
    metadata = {
        **({} if code is None else {_CODE: code}),
        "config": to_json(config),
        "classes": json.dumps(classes),
        "mean": json.dumps(mean.tolist()),
        "std": json.dumps(std.tolist()),
    }
    _write(path, _with_digest(to_safetensors(tensors, metadata)), "weights")


def _with_digest(data: bytes) -> bytes:
    """A safetensors file with its digest, and with its metadata in order.

    safetensors writes metadata in another order each time; the same weights should be the same
    bytes.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(
        sorted((header["__metadata__"] | {_DIGEST: _digest(data)}).items())
    )
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned, at offsets from the end of the header
    return len(text).to_bytes(8, "little") + text + data[end:]


def _digest(data: bytes) -> str:
    """SHA-256 of a safetensors file: of its header without the digest itself, and its tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.get("__metadata__", {}).pop(_DIGEST, None)
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    found.update(memoryview(data)[end:])
    return found.hexdigest()


def load_weights(path: Path) -> Weights:
    """Reads what :func:`save_weights` wrote.

    Raises:
        ResfastError: the file is missing, damaged, or not written by resfast.train.
    """
    try:
        data = path.read_bytes()  # safetensors cannot open a path that is not UTF-8
        tensors = from_safetensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__", {})
        if metadata.get(_DIGEST) not in (None, _digest(data)):  # older files have none
            raise ValueError("it is damaged: its checksum is wrong")
        weights = Weights(
            tensors,
            from_json(metadata["config"], str(path)),
            tuple(json.loads(metadata["classes"])),
            torch.tensor(json.loads(metadata["mean"])),
            torch.tensor(json.loads(metadata["std"])),
            metadata.get(_CODE),
        )
        if not weights.mean.shape == weights.std.shape == (3,):
            raise ValueError("its mean and standard deviation do not have 3 channels")
        if not all(isinstance(name, str) for name in weights.classes):
            raise ValueError("its class names are not text")
    except FileNotFoundError:
        raise ResfastError(
            f"there are no weights {path}; expected the folder of a finished run of resfast.train"
        ) from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ResfastError(
            f"weights {path} cannot be read ({error}); expected a file written by resfast.train"
            f"{_instead_of(path)}"
        ) from None
    return weights


def _instead_of(path: Path) -> str:
    """What may be used in the place of damaged weights."""
    others = {WEIGHTS: (BEST, "best"), BEST: (WEIGHTS, "final")}
    file, option = others.get(path.name, ("", ""))
    if file and path.with_name(file).is_file():
        return f"; use {file} instead (--weights {option}), or a copy of this file"
    return ""
