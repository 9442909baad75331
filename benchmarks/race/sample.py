"""Clocks, temperature and load of the machine, by ``nvidia-smi`` and ``/proc``."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import time

from pydantic import BaseModel, ConfigDict

from resfast import runtime

logger = logging.getLogger("resfast")

SMI, SMI_SECONDS = "nvidia-smi", 20.0
IDLE_SECONDS, IDLE_POLL_SECONDS = 15.0, 0.1
_QUANTITIES = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "gpu_celsius": "temperature.gpu",
    "gpu_watts": "power.draw",
}


class Sample(BaseModel):
    """The machine at one moment; what cannot be read is None.

    Attributes:
        sm_mhz: clock of the GPU's multiprocessors.
        memory_mhz: clock of its memory.
        gpu_celsius: its temperature.
        gpu_watts: its power draw.
        cpu_mhz: mean clock of all cores.
        load: processes that run or wait to, averaged over the last minute.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    sm_mhz: float | None = None
    memory_mhz: float | None = None
    gpu_celsius: float | None = None
    gpu_watts: float | None = None
    cpu_mhz: float | None = None
    load: float | None = None


class Sampler:
    """Reads the machine's state; without a GPU, only the CPU's.

    Attributes:
        gpu: name, driver, highest clock and power limit of the GPU; empty without one.
    """

    def __init__(self) -> None:
        self.gpu: dict[str, str] = {}
        self._reported = False
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        self._gpu_id = visible if visible not in ("", "-1") and shutil.which(SMI) else None
        fields = ("name", "driver_version", "clocks.max.sm", "power.limit")
        if values := self._query(fields):
            self.gpu = dict(zip(fields, values, strict=True))
        else:
            self._gpu_id = None

    def sample(self) -> Sample:
        """The state of the machine now."""
        values = self._query(tuple(_QUANTITIES.values())) or []
        gpu = {name: _number(value) for name, value in zip(_QUANTITIES, values, strict=False)}
        return Sample(**gpu, cpu_mhz=_cpu_mhz(), load=round(os.getloadavg()[0], 2))

    def wait_until_idle(self) -> None:
        """Waits until the GPU has no work, such as that which a paused process had queued.

        Warns once if another process keeps it busy for :data:`IDLE_SECONDS`.
        """
        deadline = time.perf_counter() + IDLE_SECONDS
        while (values := self._query(("utilization.gpu",))) and _number(values[0]):
            if time.perf_counter() > deadline:
                if not self._reported:
                    logger.warning(
                        "the GPU is busy although every contender is paused: something else uses it"
                    )
                self._reported = True
                return
            time.sleep(IDLE_POLL_SECONDS)

    def _query(self, fields: tuple[str, ...]) -> list[str] | None:
        if self._gpu_id is None:
            return None
        command = [SMI, f"--id={self._gpu_id}", f"--query-gpu={','.join(fields)}"]
        command.append("--format=csv,noheader,nounits")
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True
            )
            values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
            if len(values) != len(fields):
                raise ValueError(f"it printed {done.stdout!r}")
        except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
            logger.warning("the GPU is not recorded: %s: %s", SMI, error)
            self._gpu_id = None
            return None
        return values


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _cpu_mhz() -> float | None:
    found = [float(mhz) for mhz in re.findall(r"(?m)^cpu MHz\s*: ([\d.]+)", runtime.cpu_info())]
    return round(sum(found) / len(found), 1) if found else None
