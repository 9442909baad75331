"""The images of a race as the files that training scripts of the airbench family read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from resfast import atomic
from resfast.data.dataset import Dataset

FOLDER, SIZE = "cifar10", 32


def write(dataset: Dataset, work: Path) -> None:
    """Writes ``cifar10/train.pt`` and ``test.pt`` below ``work``, unless they have these images.

    Each is a dictionary of ``images``, uint8 ``[N, 32, 32, 3]``, ``labels``, int64 ``[N]``, and
    ``classes``, a list of names.

    Raises:
        OSError: a file cannot be written; an older one is intact.
    """
    folder = work / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    atomic.remove_stale(folder)
    for split in ("train", "test"):
        content = {
            "images": getattr(dataset, f"{split}_images"),
            "labels": getattr(dataset, f"{split}_labels"),
            "classes": list(dataset.classes),
        }
        path = folder / f"{split}.pt"
        if not _has(path, content):
            with atomic.replacing(path) as temporary:
                torch.save(content, temporary)


def _has(path: Path, content: dict[str, Any]) -> bool:
    """Whether a file exists and has this content."""
    if not path.exists():
        return False
    try:
        found = torch.load(path, weights_only=True)
        return (
            found["classes"] == content["classes"]
            and torch.equal(found["images"], content["images"])
            and torch.equal(found["labels"], content["labels"])
        )
    except Exception:  # noqa: BLE001  # damaged, or another program's: it is written again
        return False
