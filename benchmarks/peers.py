"""Fused networks against other libraries on the CPU, each alone in a process of its own.

``python -m benchmarks.peers`` times resfast, torch.compile (max-autotune, freezing), OpenVINO and
ONNX Runtime with their defaults; the allocator is that of a user. The processes of a case take
turns, so that other load on the machine affects all of them equally, and sleep between their turns.
``--peers "resfast,resfast beside OpenVINO"`` compares with a process where the threads of another
library are alive.
A library that is not installed or cannot run a case is a row with the reason. Results are compared
with float32 before they are timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import bench_report
from benchmarks.peer_worker import BESIDE, NETWORKS, PEERS, installed
from benchmarks.report import hardware, version
from benchmarks.worker_process import WorkerProcess
from resfast import atomic

OURS = "resfast"
READY_SECONDS = 600


@dataclass
class Row:
    """A peer's result for one network, batch and dtype.

    Attributes:
        rates: images per second of each turn.
        error: relative RMS error against float32.
        peak_rss_mib: peak memory of its process.
        missing: why there is no result.
    """

    peer: str
    model: str
    batch: int
    dtype: str
    rates: list[float] = field(default_factory=list)
    error: float | None = None
    peak_rss_mib: int | None = None
    missing: str | None = None

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


class Worker(WorkerProcess):
    """A process that runs one peer."""

    def __init__(self, row: Row) -> None:
        self.row = row
        arguments = [row.peer, row.model, str(row.batch), row.dtype]
        super().__init__("benchmarks.peer_worker", arguments)
        answer = self.answer()
        row.missing, row.error = answer.get("missing"), answer.get("error")

    def turn(self, seconds: float) -> None:
        """Times calls for some seconds."""
        answer = self.ask(seconds)
        if "rate" in answer:
            self.row.rates.append(answer["rate"])
            self.row.peak_rss_mib = answer["peak_rss_mib"]
        else:
            self.row.missing = answer.get("missing")


def measure(
    peers: Sequence[str], model: str, batch: int, dtype: str, turns: int, seconds: float
) -> list[Row]:
    """The rows of all peers for one case."""
    rows, workers = [], []
    for peer in peers:
        row = Row(peer, model, batch, dtype)
        rows.append(row)
        row.missing = installed(peer, dtype)
        if row.missing is None:
            workers.append(Worker(row))
    workers = [worker for worker in workers if worker.row.missing is None]
    try:
        for _ in range(turns):
            for worker in workers:
                if worker.row.missing is None:
                    worker.turn(seconds)
    finally:
        for worker in workers:
            worker.close()
    return rows


def lines(rows: list[Row]) -> list[str]:
    """A case as text: images per second, and resfast's ratio to the fastest other."""
    timed = {row.peer: row for row in rows if row.rates}
    others = [row.rate for row in timed.values() if not row.peer.startswith(OURS)]
    found = []
    for row in rows:
        text = row.missing or ""
        if row.rates:
            text = (
                f"{row.rate:>9,.0f} images/s ({min(row.rates):,.0f} to {max(row.rates):,.0f}), "
                f"error {row.error:.4f}, {row.peak_rss_mib:,} MiB"
            )
        found.append(f"  {row.peer:<14} {text}")
    first = rows[0]
    ratio = ""
    if OURS in timed and others:
        ratio = f": {timed[OURS].rate / max(others):.2f} times the fastest other"
        best = max(max(row.rates) for row in timed.values() if not row.peer.startswith(OURS))
        ratio += f" ({max(timed[OURS].rates) / best:.2f} by the best turns)"
    return [f"{first.model}, batch {first.batch}, {first.dtype}{ratio}", *found]


PACKAGES = {
    "resfast": ("resfast", "torch"),
    "torch.compile": ("torch",),
    "OpenVINO": ("openvino",),
    "ONNX Runtime": ("onnxruntime",),
    **dict.fromkeys(BESIDE, ("resfast", "torch")),
}
"""Packages whose versions matter to a peer."""


def report(rows: list[Row]) -> bench_report.Report:
    """A case as rows of :mod:`benchmarks.bench_report`, relative to the fastest other library."""
    processor = str(hardware("cpu")["processor"])
    timed = [row for row in rows if row.rates]
    others = [row for row in timed if not row.peer.startswith(OURS)]
    fastest = max(others, key=lambda row: row.rate, default=None)
    found, skipped = [], []
    for row in rows:
        case: dict[str, Any] = {"case": row.model, "name": row.peer, "hardware": processor}
        case |= {"batch": row.batch, "dtype": row.dtype}
        if not row.rates:
            reason = row.missing or "it was not timed"
            skipped.append(bench_report.Skipped(**case, reason=reason))
            continue
        versions = (f"{name} {version(name)}" for name in PACKAGES[row.peer])
        case |= {"kind": "peer", "device": "cpu", "source": "python -m benchmarks.peers"}
        case |= {"seconds": row.batch / row.rate, "images_per_second": row.rate}
        case |= {"rounds": len(row.rates), "relative_error": row.error}
        case |= {"figures": {"peak_rss_mib": row.peak_rss_mib}, "versions": ", ".join(versions)}
        case |= {"date": f"{datetime.now(UTC):%Y-%m-%d}"}
        if fastest is not None:
            turns = [one / other for one, other in zip(row.rates, fastest.rates, strict=False)]
            case |= {"baseline": fastest.peer, "ratio": row.rate / fastest.rate}
            case |= {"ratio_range": (min(turns), max(turns))}
        found.append(bench_report.Row(**case))
    return bench_report.Report(tuple(found), tuple(skipped))


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.peers", description=__doc__)
    parser.add_argument(
        "--peers",
        default=",".join(PEERS),
        help=f"comma-separated, of {', '.join([*PEERS, *BESIDE])}",
    )
    parser.add_argument(
        "--models", default="resnet-2111,resnet18", help=f"comma-separated, each {NETWORKS}"
    )
    parser.add_argument("--batches", default="1,8,64,512", help="comma-separated")
    parser.add_argument("--dtypes", default="bf16,fp32", help="comma-separated: bf16, fp32, int8")
    parser.add_argument("--turns", type=int, default=5, help="of each peer and case")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    parser.add_argument(
        "--json", type=Path, help="file to write all rows to, for benchmarks.bench_report"
    )
    options = parser.parse_args()
    done = bench_report.Report()
    for dtype in options.dtypes.split(","):
        for model in options.models.split(","):
            for batch in map(int, options.batches.split(",")):
                peers = options.peers.split(",")
                case = measure(peers, model, batch, dtype, options.turns, options.seconds)
                print(*lines(case), sep="\n", flush=True)
                found = report(case)
                done = bench_report.Report(done.rows + found.rows, done.skipped + found.skipped)
                if options.json is not None:  # now, so that nothing is lost if a case is cut off
                    atomic.write_bytes(options.json, bench_report.encoded(done))


if __name__ == "__main__":
    main()
