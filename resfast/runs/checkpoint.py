"""Saves and loads resumable states and weights, atomically.

``checkpoint.pt`` is the resumable state (``torch.save``, read with ``weights_only=True``);
``model.safetensors`` is the result, with the configuration, classes and normalization in its
metadata, so that this file is enough to use the network.
"""

from __future__ import annotations

import io
import json
import pickle
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

FORMAT = 1
PROJECTOR = "projector"
"""Module that is part of a network during pre-training alone."""


def _write(path: Path, data: bytes | memoryview, what: str) -> None:
    try:
        atomic.write_bytes(path, data)
    except OSError as error:
        previous = f"the previous {path} is intact" if path.exists() else "there is no previous one"
        raise ResfastError(
            f"cannot save the {what} to {path}: {error.strerror or error} ({len(data):,} bytes); "
            f"{previous}; free some space or fix the permissions, then continue with "
            f"--resume {path.parent}"
        ) from None


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a resumable state; the old file is replaced only once the new one is complete.

    Raises:
        ResfastError: the file cannot be written (full disk, permissions); the old one is intact.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    _write(path, buffer.getbuffer(), "checkpoint")


def load_state(path: Path) -> dict[str, Any]:
    """Reads a resumable state onto the CPU.

    Raises:
        ResfastError: the file is missing, damaged, or of another format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ResfastError(
            f"there is no checkpoint {path}: the run stopped before its first one, or this is not "
            "a run; start again with --config and another --name"
        ) from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ResfastError(
            f"checkpoint {path} cannot be read ({next(iter(str(error).splitlines()), error)}); "
            "expected a file written by resfast.train"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ResfastError(f"{path} is not a checkpoint of format {FORMAT} of resfast.train")
    return state


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
    """

    tensors: dict[str, Tensor]
    config: Config
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor


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
    metadata = {
        "config": to_json(config),
        "classes": json.dumps(classes),
        "mean": json.dumps(mean.tolist()),
        "std": json.dumps(std.tolist()),
    }
    _write(path, to_safetensors(tensors, metadata), "weights")


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
        weights = Weights(
            tensors,
            from_json(metadata["config"], str(path)),
            tuple(json.loads(metadata["classes"])),
            torch.tensor(json.loads(metadata["mean"])),
            torch.tensor(json.loads(metadata["std"])),
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
        ) from None
    return weights
