"""Images without labels, trained on with the labels that a run predicts for them.

Source: Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method", ICML 2013
workshop; the threshold is that of Sohn et al., "FixMatch", arXiv:2001.07685.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resfast.config.schema import Config
from resfast.data import batches as feed
from resfast.data.unlabelled import open_images
from resfast.errors import ResfastError
from resfast.inference.load import TrainedRun, load

_BATCH = 1000


@dataclass(frozen=True)
class PseudoLabels:
    """Images without labels, and the predictions that are kept.

    Attributes:
        images: uint8 ``[N, S, S, 3]``.
        labels: int64 ``[N]``, -1 for images that are left out.
        digest: of the images, 32 hex digits.
    """

    images: Tensor
    labels: Tensor
    digest: str

    def added_to(self, source: feed.Source) -> feed.Source:
        """The labelled images and those with a predicted label.

        Raises:
            ResfastError: the labelled images are not in memory.
        """
        if not isinstance(source, tuple):
            raise ResfastError(
                "--unlabelled adds images to those in memory; use it with --loader resident"
            )
        kept = self.labels >= 0
        images, labels = source
        return (
            torch.cat([images, self.images[kept].to(images.device)]),
            torch.cat([labels, self.labels[kept].to(labels.device)]),
        )

    def state_dict(self) -> dict[str, Any]:
        """The labels, so that a resumed run does not depend on the run that predicted them."""
        return {"labels": self.labels, "digest": self.digest}


def pseudo_labels(
    config: Config,
    classes: Sequence[str],
    image_size: int,
    *,
    saved: dict[str, Any] | None,
    say: Callable[[str], None],
) -> PseudoLabels | None:
    """Reads the images of ``--unlabelled`` and labels them.

    Args:
        config: names the images, the run and the threshold.
        classes: the class names to predict, in order.
        image_size: height and width in pixels.
        saved: what :meth:`PseudoLabels.state_dict` returned when the run began; None to predict.
        say: called with a line about the labels.

    Returns:
        The labels, or None without ``--unlabelled``.

    Raises:
        ResfastError: images that cannot be read or have changed, a run that does not fit, or no
            image above the threshold.
    """
    transfer = config.transfer
    if transfer.unlabelled is None:
        return None
    source = open_images([transfer.unlabelled])
    parts = source.batches(image_size, _BATCH, config.data.skip_corrupt)
    images = torch.cat([part for _, part, _ in parts])
    digest = hashlib.blake2b(images.numpy().data, digest_size=16).hexdigest()
    if saved is not None:
        if saved["digest"] != digest:
            raise ResfastError(
                f"cannot resume: the images of --unlabelled {transfer.unlabelled} have changed; "
                "restore them or start a new run"
            )
        return PseudoLabels(images, saved["labels"], digest)
    run = load(transfer.pseudo_from, device=config.runtime.device)
    check_fits(run, "--pseudo-from", classes, image_size)
    probability, labels = run.probabilities(images).max(1)
    kept = probability >= transfer.pseudo_threshold
    if not bool(kept.any()):
        raise ResfastError(
            f"none of the {len(images):,} images of --unlabelled has a class of probability "
            f"{transfer.pseudo_threshold:g} or more, the most is {float(probability.max()):.4g}; "
            "choose a lower --pseudo-threshold"
        )
    counts = torch.bincount(labels[kept], minlength=len(classes)).tolist()
    each = ", ".join(f"{name} {count:,}" for name, count in zip(classes, counts, strict=True))
    say(
        f"pseudo-labels for {int(kept.sum()):,} of {len(images):,} images without labels "
        f"(probability at least {transfer.pseudo_threshold:g}): {each}"
    )
    return PseudoLabels(images, torch.where(kept, labels, -1), digest)


def check_fits(run: TrainedRun, option: str, classes: Sequence[str], image_size: int) -> None:
    """Checks that a run predicts the classes of a training, from images of its size.

    Args:
        run: the run.
        option: that names it, for the error message.
        classes: the class names of the training, in order.
        image_size: height and width in pixels.

    Raises:
        ResfastError: it does not.
    """
    if run.classes != tuple(classes):
        shown = [", ".join(names[:10]) for names in (run.classes, tuple(classes))]
        raise ResfastError(
            f"{option} {run.path} was trained on the classes {shown[0]}, not on {shown[1]}; choose "
            "a run with the same classes"
        )
    if run.image_size != image_size:
        raise ResfastError(
            f"{option} {run.path} was trained on images of {run.image_size} pixels, not "
            f"{image_size}; choose another run, or --image-size {run.image_size}"
        )
