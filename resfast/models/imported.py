"""Networks from elsewhere by name: torchvision's, timm's, and those made by a user's file.

``torchvision:resnet18``, ``timm:resnet18.a1_in1k`` and ``nets/mine.py:make`` are values of
``--model`` wherever a preset is. Their code is not this project's. That of a file runs only if the
user named the file in this process: see :func:`trust`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resfast.errors import ResfastError, nearest

LIBRARIES = ("torchvision", "timm")
KINDS = "torchvision:NAME, timm:NAME or FILE.py:FUNCTION"
RESERVED = ("whitening", "projector")
"""Names of submodules that the trainer looks for in its own networks."""
_CLASSES = ("num_classes", "classes", "n_classes", "num_labels")
"""Parameters of a function that say how many logits to return."""
_SIZES = ("image_size", "img_size")
_trusted: dict[Path, None] = {}
_neighbours: dict[Path, dict[str, Any]] = {}
"""Modules that the files of a folder have imported from it, by folder and name."""


@dataclass(frozen=True)
class ImportedSpec:
    """A network that code outside of this project makes.

    Attributes:
        source: a library's name or a Python file, a colon, and the name of a network or function.
    """

    source: str

    def __str__(self) -> str:
        return self.source

    @property
    def parts(self) -> tuple[str, str]:
        """Library or file, and the name in it."""
        where, _, name = self.source.rpartition(":")
        return where, name


def is_imported(model: str) -> bool:
    """Whether a value of ``--model`` names a network from elsewhere."""
    where, colon, _ = model.rpartition(":")
    return bool(colon) and (where in LIBRARIES or where.endswith(".py"))


def trust(file: str | os.PathLike[str]) -> None:
    """Lets the code of a Python file run in this process, where a run was trained with it.

    Loading a run must not run code that only the run names: its folder may be someone else's. A
    file that ``--model`` names on the command line is trusted.

    Args:
        file: ``net.py``. If a run's own path does not exist, as on another machine, a trusted file
            of the same name is taken instead.

    Raises:
        ResfastError: there is no such file.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ResfastError(
            f"--trust {file}: there is no such file; give the Python file of --model"
        )
    _trusted[path.resolve()] = None


def trust_model(model: str) -> None:
    """:func:`trust` for a value of ``--model`` that a user gave; others need no trust.

    A file that does not exist is reported when the network is built.
    """
    if is_imported(model):
        where, _ = ImportedSpec(model).parts
        if where.endswith(".py") and Path(where).expanduser().is_file():
            trust(where)


def build_imported(spec: ImportedSpec, classes: int, image_size: int | None) -> nn.Module:
    """A freshly initialised network from elsewhere.

    Args:
        spec: the network.
        classes: number of logits.
        image_size: height and width in pixels of images that it must accept; None for no check.

    Returns:
        The network in training mode, on the CPU, in float32.

    Raises:
        ResfastError: fewer than two classes; the library, file or name does not exist; the file is
            not trusted, its code failed, or it made no network of these images and classes.
    """
    if classes < 2:
        raise ResfastError(f"{classes} classes are too few; expected at least 2")
    where, _ = spec.parts
    make = _FROM_LIBRARY.get(where, _from_file)
    model = make(spec, classes, image_size)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ResfastError(
            f"--model {spec} made a {type(model).__name__}; expected a torch.nn.Module that is not "
            "compiled to TorchScript"
        )
    _check_parts(spec, model)
    if image_size is not None:
        _check_logits(spec, model, classes, image_size)
    return model.train()


def _from_torchvision(spec: ImportedSpec, classes: int, image_size: int | None) -> Any:
    from torchvision import models

    _, name = spec.parts
    known = models.list_models(module=models)
    if name not in known:
        raise ResfastError(
            f"--model {spec}: torchvision has no classification network of this name"
            f"{nearest(name, known)} (torchvision.models.list_models() has them all)"
        )
    options: dict[str, Any] = {"num_classes": classes}
    if image_size is not None and name.startswith("vit_"):
        options["image_size"] = image_size
    if name == "googlenet":
        options |= {"aux_logits": False, "init_weights": True}
    if name == "inception_v3":
        options |= {"init_weights": True}
    return _made(spec, lambda: models.get_model(name, weights=None, **options))


def _from_timm(spec: ImportedSpec, classes: int, image_size: int | None) -> Any:
    _, name = spec.parts
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ResfastError(f"--model {spec} needs timm ({error}); pip install timm") from None
    if not timm.is_model(name.partition(".")[0]):
        raise ResfastError(
            f"--model {spec}: timm has no network of this name{nearest(name, timm.list_models())} "
            "(timm.list_models() has them all)"
        )

    def make() -> Any:
        try:
            return timm.create_model(
                name, pretrained=False, num_classes=classes, img_size=image_size
            )
        except TypeError:  # networks for images of any size do not take it
            return timm.create_model(name, pretrained=False, num_classes=classes)

    return _made(spec, make)


def _from_file(spec: ImportedSpec, classes: int, image_size: int | None) -> Any:
    file, name = _trusted_file(spec), spec.parts[1]
    module = _module(spec, file)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise ResfastError(
            f"--model {spec}: {file} has no function or class {name!r}{nearest(name, known)}"
        )
    try:
        accepted = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        accepted = set()
    options = {key: classes for key in _CLASSES if key in accepted}
    if image_size is not None:
        options |= {key: image_size for key in _SIZES if key in accepted}
    with _importing_beside(file.parent):
        return _made(spec, lambda: function(**options))


_FROM_LIBRARY: dict[str, Callable[[ImportedSpec, int, int | None], Any]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
}


def _trusted_file(spec: ImportedSpec) -> Path:
    """The file to run, if the user named it."""
    path = Path(spec.parts[0]).expanduser()
    if path.resolve() in _trusted:
        return path.resolve()
    if not path.is_file():
        moved = [file for file in _trusted if file.name == path.name]
        if len(moved) > 1:
            raise ResfastError(
                f"--model {spec}: there is no file {path}, and {len(moved)} trusted files have its "
                f"name ({', '.join(map(str, moved))}); trust the one that made the network alone"
            )
        if moved:
            return moved[0]
        raise ResfastError(
            f"--model {spec}: there is no file {path}; name one where it is now, in training with "
            "--model, otherwise with --trust FILE.py or resfast.trust"
        )
    raise ResfastError(
        f"the network is made by the code of {path}, which was not named in this command; if you "
        f"trust that file, add --trust {path}, or call resfast.trust in a program"
    )


@contextlib.contextmanager
def _importing_beside(folder: Path) -> Iterator[None]:
    """Lets code import the neighbours of its file, and no other file's of the same names."""
    hidden = {}
    for other, modules in _neighbours.items():
        if other != folder:
            for name, module in modules.items():
                if sys.modules.get(name) is module:
                    hidden[name] = sys.modules.pop(name)
    own = _neighbours.setdefault(folder, {})
    sys.modules.update(own)
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).resolve().is_relative_to(folder):
                own[name] = sys.modules[name]
        for name, module in hidden.items():
            sys.modules.setdefault(name, module)
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # for imports inside of functions


def _module(spec: ImportedSpec, file: Path) -> Any:
    """The file as a module, which can import its neighbours; executed once per process."""
    name = f"resfast_network_{hashlib.sha256(os.fsencode(file)).hexdigest()[:16]}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        with _importing_beside(file.parent):
            found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ResfastError(f"--model {spec}: {file} failed: {_described(error)}") from error
    return module


def source_digest(model: str) -> str | None:
    """SHA-256 of the code of a network that a file makes: of that file and its loaded neighbours.

    None for other networks. Neighbours are known once the network has been built in this process.
    """
    if not is_imported(model) or model.rpartition(":")[0] in LIBRARIES:
        return None
    file = _trusted_file(ImportedSpec(model))
    own = _neighbours.get(file.parent, {})
    found = hashlib.sha256(file.read_bytes())
    for name in sorted(own):
        found.update(name.encode())
        found.update(Path(own[name].__file__).read_bytes())
    return found.hexdigest()


def _made(spec: ImportedSpec, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (Exception, SystemExit) as error:  # whatever the code of others raises
        raise ResfastError(f"--model {spec} cannot be built: {_described(error)}") from error


def _described(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _check_parts(spec: ImportedSpec, model: nn.Module) -> None:
    for name, _ in model.named_children():
        if name in RESERVED:
            raise ResfastError(
                f"--model {spec} has a submodule {name!r}, a name that this project's networks use "
                "for a part of their own; rename it"
            )
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ResfastError(
                f"--model {spec}: the state dict has a {type(value).__name__} ({name}); expected "
                "tensors only"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ResfastError(
                f"--model {spec}: {name} has no shape yet, as in a lazy layer; give its size"
            )
        if parameter.dtype != torch.float32:
            raise ResfastError(
                f"--model {spec}: {name} is {parameter.dtype}; expected torch.float32"
            )


def _check_logits(spec: ImportedSpec, model: nn.Module, classes: int, image_size: int) -> None:
    """Checks what a copy of the network returns for two images, in evaluation and in training."""
    images = torch.zeros(2, 3, image_size, image_size)
    for mode in ("evaluation", "training"):
        try:
            network = copy.deepcopy(model).train(mode == "training")
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                logits = network(images)
                logits_of = f"returns {_shape(logits)} for 2 images in {mode}"
        except Exception as error:
            raise ResfastError(
                f"--model {spec} does not take images of {image_size}x{image_size} pixels "
                f"({_described(error)}); choose another --image-size"
            ) from error
        if _shape(logits) != [2, classes]:
            raise ResfastError(
                f"--model {spec} {logits_of}; expected logits [2, {classes}]. A function with a "
                f"parameter {_CLASSES[0]} is given the number of classes"
            )
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                network.to(memory_format=torch.channels_last)(
                    images.contiguous(memory_format=torch.channels_last)
                )
        except Exception as error:
            raise ResfastError(
                f"--model {spec} does not take images in channels_last memory, in which training "
                f"is faster ({_described(error)}); use x.flatten(1) or x.reshape in the place of "
                "x.view"
            ) from error


def _shape(value: Any) -> Any:
    return list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
