"""Training steps of others' networks with ``resfast.optimize``, torch.compile and eager PyTorch.

``python -m benchmarks.optimize --models torchvision:resnet18@224,timm:resnet18 --batch 32`` times
bf16 steps on the CPU. Each contender is alone in a process; the allocator is that of a user. The
processes of a network take turns, so that other load on the machine affects all of them equally.
A network that a contender cannot train is a row with the reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.optimize_worker import CONTENDERS
from benchmarks.peer_worker import NETWORKS
from benchmarks.report import hardware
from benchmarks.worker_process import WorkerProcess
from resfast import atomic

OURS = "resfast"


@dataclass
class Row:
    """A contender's result for one network.

    Attributes:
        seconds: per step, of each turn.
        peak_rss_mib: peak memory of its process.
        missing: why there is no result.
    """

    contender: str
    model: str
    batch: int
    seconds: list[float] = field(default_factory=list)
    peak_rss_mib: int | None = None
    missing: str | None = None


class Worker(WorkerProcess):
    """A process that trains with one contender."""

    def __init__(self, row: Row) -> None:
        self.row = row
        arguments = [row.contender, row.model, str(row.batch)]
        super().__init__("benchmarks.optimize_worker", arguments)
        row.missing = self.answer().get("missing")

    def turn(self, seconds: float) -> None:
        """Times steps for some seconds."""
        answer = self.ask(seconds)
        self.row.missing = answer.get("missing")
        if self.row.missing is None:
            self.row.seconds.append(answer["seconds"])
            self.row.peak_rss_mib = answer["peak_rss_mib"]


def measure(
    contenders: Sequence[str], model: str, batch: int, turns: int, seconds: float
) -> list[Row]:
    """The rows of all contenders for one network."""
    workers = []
    rows = [Row(contender, model, batch) for contender in contenders]
    try:
        workers = [Worker(row) for row in rows]
        for _ in range(turns):
            for worker in workers:
                if worker.row.missing is None:
                    worker.turn(seconds)
    finally:
        for worker in workers:
            worker.close()
    return rows


def ratios(ours: Row, other: Row) -> list[float]:
    """How many times as fast ours is, turn by turn."""
    return [b / a for a, b in zip(ours.seconds, other.seconds, strict=False)]


def lines(rows: list[Row]) -> list[str]:
    """A network as text: seconds per step, and the speed of ours relative to each other."""
    found = [f"{rows[0].model}, batch {rows[0].batch}, bf16"]
    ours = next((row for row in rows if row.contender == OURS and row.seconds), None)
    for row in rows:
        text = row.missing or "it was not timed"
        if row.seconds:
            median = statistics.median(row.seconds)
            text = f"{median:.4f} s a step ({min(row.seconds):.4f} to {max(row.seconds):.4f})"
            text += f", {row.peak_rss_mib:,} MiB"
            if ours is not None and row is not ours:
                pairs = ratios(ours, row)
                text += f"; resfast is {statistics.median(pairs):.2f} times as fast"
                text += f" ({min(pairs):.2f} to {max(pairs):.2f})"
        found.append(f"  {row.contender:<18} {text}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.optimize", description=__doc__)
    parser.add_argument(
        "--models",
        default="torchvision:resnet18@224,torchvision:resnet50@224,timm:resnet18",
        help=f"comma-separated, each {NETWORKS}",
    )
    parser.add_argument(
        "--contenders",
        default="resfast;torch.compile;eager",
        help=f"separated by semicolons, of {'; '.join(CONTENDERS)}",
    )
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--turns", type=int, default=5, help="of each contender and network")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn, at least two steps")
    parser.add_argument("--json", type=Path, help="file to write all rows to")
    options = parser.parse_args()
    contenders = options.contenders.split(";")
    for name in contenders:
        if name not in CONTENDERS:
            parser.error(f"contender {name!r} is unknown; choose {'; '.join(CONTENDERS)}")
    done: list[Row] = []
    for model in options.models.split(","):
        rows = measure(contenders, model, options.batch, options.turns, options.seconds)
        print(*lines(rows), sep="\n", flush=True)
        done += rows
        if options.json is not None:  # now, so that nothing is lost if a network is cut off
            content = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "hardware": hardware("cpu")}
            content |= {"rows": [asdict(row) for row in done]}
            atomic.write_bytes(options.json, json.dumps(content, indent=1).encode())


if __name__ == "__main__":
    main()
