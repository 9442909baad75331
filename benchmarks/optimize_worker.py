"""The process of one contender of ``benchmarks.optimize``: answers lines of JSON.

``python -m benchmarks.optimize_worker CONTENDER NETWORK BATCH`` prints an empty object when it has
trained for a few steps, then for each number of seconds on standard input the seconds per step of
that time.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peer_worker import build
from benchmarks.worker_process import open_answers

WARM_UP = 3
"""Steps before the first turn."""
Step = Callable[[], None]


def eager(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    return model


def compiled(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    return torch.compile(model, dynamic=False)


def ours(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    import resfast

    return resfast.optimize(model, optimizer)[0]


def both(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    return compiled(ours(model, optimizer), optimizer)


CONTENDERS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], nn.Module]] = {
    "resfast": ours,
    "resfast, compiled": both,
    "torch.compile": compiled,
    "eager": eager,
}


def training_step(contender: str, network: str, batch: int) -> Step:
    """A step of SGD in bf16 autocast on one batch, in ``channels_last``.

    Args:
        contender: one of :data:`CONTENDERS`.
        network: as for ``benchmarks.peers``.
        batch: images per step.
    """
    model, pixels = build(network)
    model = model.requires_grad_(True).train().to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.1  # of which build makes 1
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    torch.manual_seed(1)
    images = torch.randn(batch, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))
    run = CONTENDERS[contender](model, optimizer)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = run(images)
            # GoogLeNet and Inception also return the logits of classifiers in between.
            logits = out if isinstance(out, torch.Tensor) else out[0]
            loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    answers = open_answers()
    try:
        step = training_step(sys.argv[1], sys.argv[2], int(sys.argv[3]))
        for _ in range(WARM_UP):
            step()
    except Exception as error:  # noqa: BLE001  # whatever a network raises is its answer
        first = str(error).strip().partition("\n")[0]
        print(json.dumps({"missing": f"{type(error).__name__}: {first}"}), file=answers)
        return
    print(json.dumps({}), file=answers)
    for line in sys.stdin:
        spent, steps = 0.0, 0
        while spent < float(line) or steps < 2:
            start = time.perf_counter()
            step()
            spent += time.perf_counter() - start
            steps += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps({"seconds": spent / steps, "peak_rss_mib": peak}), file=answers)


if __name__ == "__main__":
    main()
