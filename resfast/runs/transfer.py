"""Starts a network from trained weights: our own, or those of other projects.

Layers are matched by name, after the names of pytorch-cifar, torchvision and timm have been brought
into one form, and have to agree in shape. What does not agree keeps its initial value.
"""

from __future__ import annotations

import json
import pickle
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from torch import Tensor, nn

from resfast.errors import ResfastError, nearest
from resfast.runs import folder as records

_OF_A_RUN = (records.WEIGHTS, records.BEST, records.CHECKPOINT)
_CONTAINERS = (
    "net",
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "network",
    "weights",
)
"""Keys under which training scripts save a state dict."""
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|model|net|backbone|encoder)\.)+")
"""Prefixes that DataParallel, torch.compile and self-supervised trainers add."""
_RENAMED = (
    (re.compile(r"^conv1\."), "stem.conv."),
    (re.compile(r"^bn1\."), "stem.bn."),
    (re.compile(r"^stem\.0\."), "stem."),
    (re.compile(r"^layer(\d+)\.(\d+)\."), lambda m: f"stages.{int(m[1]) - 1}.{m[2]}."),
    (re.compile(r"\.(?:downsample|shortcut)\.0\."), ".shortcut.conv."),
    (re.compile(r"\.(?:downsample|shortcut)\.1\."), ".shortcut.bn."),
)  # fmt: skip
_SHOWN = 8
"""Most names that a message lists."""


@dataclass(frozen=True)
class Source:
    """Weights to start from.

    Attributes:
        file: where they were read.
        tensors: by name.
        classes: class names in the order of the logits, or None where the file does not have them.
    """

    file: Path
    tensors: dict[str, Tensor]
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Row:
    """What became of one tensor of the network.

    Attributes:
        name: in the network.
        shape: in the network.
        source: its name in the file, or None if the file has nothing for it.
        reason: why it was not taken, or None if it was.
    """

    name: str
    shape: tuple[int, ...]
    source: str | None
    reason: str | None


@dataclass(frozen=True)
class Transfer:
    """What a network took from a file.

    Attributes:
        file: the file.
        rows: one for each tensor of the network, in its order.
        left: names of the file's tensors that the network has no place for.
    """

    file: Path
    rows: tuple[Row, ...]
    left: tuple[str, ...]

    def took(self, name: str) -> bool:
        """Whether the network's tensor of this name was taken."""
        return any(row.name == name and row.reason is None for row in self.rows)

    def table(self) -> str:
        """A line for each part of the network, then what was not taken, and what was left."""
        parts: dict[str, list[Row]] = {}
        for row in self.rows:
            parts.setdefault(_part(row.name), []).append(row)
        width = max(map(len, (*parts, "weights of")))
        lines = [f"initial weights from {self.file}", f"  {'weights of':<{width}}  taken    values"]
        for part, rows in parts.items():
            taken = [row for row in rows if row.reason is None]
            values = sum(_count(row.shape) for row in taken)
            counts = f"{len(taken)}/{len(rows)}"
            lines.append(f"  {part:<{width}}  {counts:>7}  {values:>10,}")
        kept = [row for row in self.rows if row.reason is not None]
        for row in kept[:_SHOWN]:
            lines.append(f"  not taken: {row.name} {list(row.shape)}: {row.reason}")
        if len(kept) > _SHOWN:
            lines.append(f"  not taken: {len(kept) - _SHOWN} more")
        if self.left:
            more = f" and {len(self.left) - _SHOWN} more" if len(self.left) > _SHOWN else ""
            lines.append(f"  left in the file: {', '.join(self.left[:_SHOWN])}{more}")
        return "\n".join(lines)


def _part(name: str) -> str:
    return re.match(r"(?:stages|features)\.\d+|[^.]+", name)[0]  # type: ignore[index]


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def read_source(path: Path) -> Source:
    """Reads weights onto the CPU; no code in the file is run.

    Args:
        path: the folder of a run, our ``model.safetensors`` or ``checkpoint.pt``, another
            ``.safetensors`` file, or a state dict saved with ``torch.save``, by itself or within a
            dictionary as pytorch-cifar's ``ckpt.pth`` has it.

    Raises:
        ResfastError: there is no such file, it cannot be read, or it has no weights.
    """
    path = path.expanduser()
    if path.is_dir():
        found = [path / name for name in _OF_A_RUN if (path / name).is_file()]
        if not found:
            raise ResfastError(
                f"--init-from {path} has no {', '.join(_OF_A_RUN)}; expected a run that has been "
                "saved, or a file of weights"
            )
        path = found[0]
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ResfastError(
            f"--init-from {path} does not exist; expected the folder of a run or a file of weights"
        ) from None
    except OSError as error:
        raise ResfastError(f"--init-from {path} cannot be read: {error.strerror}") from None
    source = _safetensors(path, data) if path.suffix == ".safetensors" else _pickled(path)
    for name, value in source.tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ResfastError(f"--init-from {path}: {name} has values that are not finite")
    return source


def _safetensors(path: Path, data: bytes) -> Source:
    try:
        tensors = from_safetensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        classes = header.get("__metadata__", {}).get("classes")
        return Source(path, tensors, None if classes is None else tuple(json.loads(classes)))
    except (SafetensorError, ValueError, TypeError) as error:
        raise ResfastError(f"--init-from {path} is not a safetensors file ({error})") from None


def _pickled(path: Path) -> Source:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ResfastError(
            f"--init-from {path} cannot be read ({next(iter(str(error).splitlines()), error)}); "
            "expected a state dict saved with torch.save, without other Python objects"
        ) from None
    tensors = _state_dict(saved)
    if tensors is None:
        keys = ", ".join(map(str, list(saved)[:_SHOWN])) if isinstance(saved, dict) else type(saved)
        raise ResfastError(
            f"--init-from {path} has no state dict, but {keys}; expected tensors by name, by "
            f"themselves or under one of {', '.join(_CONTAINERS)}"
        )
    return Source(path, tensors)


def _state_dict(saved: Any) -> dict[str, Tensor] | None:
    """The state dict in a saved object: of the averaged weights where ours has them."""
    if not isinstance(saved, Mapping):
        return None
    if isinstance(saved.get("training"), Mapping):  # our checkpoint.pt
        training = saved["training"]
        return _state_dict(training.get("ema") or training.get("model"))
    for key in _CONTAINERS:
        if (found := _state_dict(saved.get(key))) is not None:
            return found
    tensors = {str(name): value for name, value in saved.items() if isinstance(value, Tensor)}
    return tensors if any(value.ndim >= 2 for value in tensors.values()) else None


def common_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Each tensor's name in the form that all projects share, to its own name.

    Residual networks have ``stem.conv``, ``stem.bn``, ``stages.0.0.conv1`` and so on; the layers of
    a plain ``features`` sequence are numbered by convolution, and dense layers from the first on.
    """
    renamed: dict[str, str] = {}
    for own in tensors:
        name = _WRAPPERS.sub("", own)
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name, count=1)
        renamed[own] = name
    # Not by the order in the file: safetensors has none.
    convolutions, dense = (
        sorted(
            {
                _place(renamed[own])
                for own, value in tensors.items()
                if value.ndim == ndim and own.endswith("weight")
                if renamed[own].startswith("features.") == (ndim == 4)
            }
        )
        for ndim in (4, 2)
    )
    found: dict[str, str] = {}
    for own, name in renamed.items():
        place, kind = _place(name), name.rpartition(".")[2]
        if name.startswith("features."):
            number = bisect_right(convolutions, place) - 1
            is_norm = place not in convolutions or ".bn." in name
            name = f"features.{number}.{'bn' if is_norm else 'conv'}.{kind}"
        elif place in dense:
            name = f"dense.{dense.index(place)}.{kind}"
        found[name] = own
    return found


def _place(name: str) -> tuple[tuple[int, str], ...]:
    """The layer of a tensor, sorting as the layers of a sequence do: 2 before 10."""
    layer = name.rpartition(".")[0]
    if layer.startswith("features."):
        layer = re.sub(r"\.(?:conv|bn)$", "", layer)
    parts = layer.split(".")
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in parts)


def initialize(model: nn.Module, source: Source, classes: Sequence[str]) -> Transfer:
    """Copies weights into a network where names and shapes agree.

    The last dense layer is taken only for the same number of classes, and not if the file names
    other classes.

    Args:
        model: the network, freshly initialized.
        source: the weights.
        classes: the class names that the network will be trained on.

    Returns:
        What was taken.

    Raises:
        ResfastError: no weight of a layer agrees.
    """
    wanted = model.state_dict()
    theirs, ours = common_names(source.tensors), common_names(wanted)
    by_own = {own: common for common, own in ours.items()}
    last = max((name for name in ours if name.startswith("dense.")), default="", key=_place)
    head = ours[last].rpartition(".")[0] if last else None
    other_classes = source.classes is not None and source.classes != tuple(classes)
    rows = []
    with torch.no_grad():
        for name, tensor in wanted.items():
            found = theirs.get(by_own[name])
            reason = None
            if found is None:
                reason = "the file has none"
            elif source.tensors[found].shape != tensor.shape:
                reason = f"{found} is {list(source.tensors[found].shape)}"
            elif other_classes and name.rpartition(".")[0] == head:
                reason = "the file's is of other classes"
            else:
                tensor.copy_(source.tensors[found])
            rows.append(Row(name, tuple(tensor.shape), found, reason))
    if not any(row.reason is None and len(row.shape) >= 2 for row in rows):
        first, shown = next(iter(source.tensors)), rows[0]
        raise ResfastError(
            f"--init-from {source.file}: no layer agrees in name and shape with the network (the "
            f"file begins with {first} {list(source.tensors[first].shape)}, the network with "
            f"{shown.name} {list(shown.shape)}); choose a file of the same kind of network"
        )
    used = {row.source for row in rows}
    return Transfer(
        source.file, tuple(rows), tuple(name for name in source.tensors if name not in used)
    )


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Freezes the parameters whose name, or whose module's name, matches a pattern.

    A batch norm without a parameter left to train normalizes with its running statistics, see
    :func:`resfast.layers.norm.train_mode`.

    Args:
        model: the network.
        patterns: as in file names: ``stem``, ``stages.0``, ``stages.[01].*``, ``*.bn1``.

    Returns:
        Number of parameter values frozen.

    Raises:
        ResfastError: a pattern that matches nothing.
    """
    frozen = 0
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matched = [p for name, p in parameters.items() if _matches(name, pattern)]
        if not matched:
            modules = [name for name, _ in model.named_modules() if name]
            tops = ", ".join(dict.fromkeys(map(_part, parameters)))
            raise ResfastError(
                f"--freeze {pattern} matches no layer{nearest(pattern, modules)} (the network has "
                f"{tops})"
            )
        for parameter in matched:
            frozen += parameter.numel() if parameter.requires_grad else 0
            parameter.requires_grad_(False)
    return frozen


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
