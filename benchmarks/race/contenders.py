"""Who races: training scripts of others in a folder, and our recipes."""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from benchmarks.race.formats import Format, Ours, Patterns, Table
from benchmarks.report import slug
from resfast.cli.train import command_line
from resfast.config.files import describe
from resfast.config.recipes import check_name
from resfast.config.validate import check
from resfast.errors import ResfastError, nearest

PEERS = "peers.toml"
ROOT = Path(__file__).resolve().parents[2]
_SET_BY_THE_RACE = (
    *("--data", "--data-dir", "--out", "--name", "--runs", "--seed", "--recipe"),
    *("--config", "--resume", "--list", "--summary", "--profile"),
)


@dataclass(frozen=True)
class Launch:
    """How to start a contender's process.

    Attributes:
        command: program and arguments.
        folder: working directory.
        format: reads its output.
    """

    command: Sequence[str]
    folder: Path
    format: Format


class Contender(Protocol):
    """One of the race.

    Attributes:
        name: unique in the race.
        kind: ours, or a peer.
        shown: its command without folders of this machine.
        digest: SHA-256 of its script; None if it has none.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Literal["resfast", "peer"]: ...
    @property
    def shown(self) -> str: ...
    @property
    def digest(self) -> str | None: ...

    def launch(self, trials: int, finished: int) -> Launch:
        """How to start it.

        Args:
            trials: trials to run, with warm-up.
            finished: trials that it ran in earlier processes, with warm-up.
        """


@dataclass(frozen=True)
class Peer:
    """A script of others; see :class:`Contender`. It runs in the folder that has ``cifar10/``."""

    name: str
    command: tuple[str, ...]
    shown: str
    digest: str | None
    work: Path
    format: Callable[[], Format]
    kind: Literal["peer"] = "peer"

    def launch(self, trials: int, finished: int) -> Launch:
        """See :class:`Contender`; a script decides by itself how many trials it runs."""
        return Launch(self.command, self.work, self.format())


@dataclass(frozen=True)
class Recipe:
    """A recipe of ours; see :class:`Contender`.

    Attributes:
        options: additional options of ``resfast.train``.
        data: value of ``--data``, with an absolute path.
        data_dir: value of ``--data-dir``, absolute.
        runs: folder for the runs.
        data_digest: digest of the images.
    """

    name: str
    options: tuple[str, ...]
    data: str
    data_dir: Path
    runs: Path
    data_digest: str
    kind: Literal["resfast"] = "resfast"
    digest: None = None

    @property
    def shown(self) -> str:
        """See :class:`Contender`."""
        return shlex.join(["python", "-m", "resfast.train", "--recipe", self.name, *self.options])

    def launch(self, trials: int, finished: int) -> Launch:
        """See :class:`Contender`; seeds follow those of earlier processes."""
        name = f"{slug(self.name)}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}"
        values = {
            "--data": self.data,
            "--data-dir": str(self.data_dir),
            "--out": str(self.runs),
            "--name": name,
            "--seed": str(finished),
            "--runs": str(max(2, trials)),  # a single run reports its end differently
        }
        given = [part for pair in values.items() for part in pair]
        command = [sys.executable, "-m", "resfast.train", "--recipe", self.name, *self.options]
        return Launch([*command, *given], ROOT, Ours(self.runs / name, self.data_digest))


def recipes(
    names: Sequence[str],
    options: Sequence[str],
    data: str,
    data_dir: Path,
    work: Path,
    data_digest: str,
) -> list[Recipe]:
    """Our contenders.

    Raises:
        ResfastError: an unknown recipe, or an option that the race sets or a bad value of one.
    """
    for option in options:
        if option.partition("=")[0] in _SET_BY_THE_RACE:
            raise ResfastError(f"{option} is set by the race for each contender; leave it out")
    for name in names:
        check_name(name)
        check(command_line(["--recipe", name, *options])[1])
    kind, colon, location = data.partition(":")
    absolute = f"{kind}:{Path(location).expanduser().resolve()}" if colon else data
    return [
        Recipe(name, tuple(options), absolute, data_dir.resolve(), work / "runs", data_digest)
        for name in names
    ]


class _Entry(BaseModel):
    """A ``[[peer]]`` of ``peers.toml``; the patterns are described in :class:`Patterns`.

    Attributes:
        name: its name in the race; by default that of its script.
        script: a Python script in the folder, run by the Python of the race.
        command: a command instead; ``{folder}`` in it is the folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    script: str | None = None
    command: str | None = Field(default=None, min_length=1)
    trial: str | None = None
    warmup: str | None = None
    start: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> _Entry:
        if (self.script is None) == (self.command is None):
            raise ValueError("expected either script or command")
        if self.command is not None and not self.name:
            raise ValueError("a command needs a name")
        if self.trial is None and (self.warmup or self.start):
            raise ValueError("warmup and start need trial too")
        for pattern in (self.trial, self.warmup, self.start):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return self


def peers(folder: Path, work: Path, only: Sequence[str] = ()) -> list[Peer]:
    """The scripts of a folder: those of its ``peers.toml``, or without it all ``*.py``.

    Args:
        folder: the scripts.
        work: folder that they run in.
        only: names to choose; all without any.

    Raises:
        ResfastError: no folder, a bad ``peers.toml``, a script that does not exist, or a name that
            is unknown or occurs twice.
    """
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise ResfastError(f"--peers {folder} is no folder; expected one with training scripts")
    path = folder / PEERS
    entries = _read(path) if path.exists() else _scripts(folder)
    found = [_peer(entry, folder, work) for entry in entries]
    names = [peer.name for peer in found]
    for name in only:
        if name not in names:
            raise ResfastError(
                f"{folder} has no peer {name!r}{nearest(name, names)} (it has: {', '.join(names)})"
            )
    return [peer for peer in found if not only or peer.name in only]


def check_names(contenders: Sequence[Contender]) -> None:
    """Checks that there are contenders, with different names.

    Raises:
        ResfastError: there are none, or two have the same name.
    """
    names = [slug(contender.name) for contender in contenders]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ResfastError(f"two contenders have the name {twice[0]!r}; name them in {PEERS}")
    if not names:
        raise ResfastError("there is nobody to race; give --peers, --recipes or both")


def _scripts(folder: Path) -> list[_Entry]:
    found = sorted(path.name for path in folder.glob("*.py") if not path.name.startswith("_"))
    if not found:
        raise ResfastError(f"{folder} has no {PEERS} and no Python script; expected either")
    return [_Entry(script=name) for name in found]


def _read(path: Path) -> list[_Entry]:
    expected = "expected [[peer]] tables with name, script or command, and trial, warmup, start"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ResfastError(f"cannot read {path}: {error}; {expected}") from None
    tables = content.get("peer")
    if set(content) != {"peer"} or not isinstance(tables, list) or not tables:
        raise ResfastError(f"{path} has {', '.join(content) or 'nothing'}; {expected}")
    entries = []
    for number, table in enumerate(tables, 1):
        try:
            entries.append(_Entry.model_validate(table))
        except ValidationError as error:
            raise ResfastError(f"{path}, peer {number}: {describe(error)}; {expected}") from None
    return entries


def _peer(entry: _Entry, folder: Path, work: Path) -> Peer:
    digest, shown = None, entry.command or f"python {entry.script}"
    if entry.script is not None:
        script = folder / entry.script
        try:
            digest = hashlib.sha256(script.read_bytes()).hexdigest()
        except OSError as error:
            raise ResfastError(f"cannot read the script {script}: {error.strerror}") from None
        command = [sys.executable, str(script)]
    else:
        parts = shlex.split(entry.command or "")
        command = [part.replace("{folder}", str(folder)) for part in parts]
    make: Callable[[], Format] = Table
    if entry.trial is not None:
        patterns = [
            None if text is None else re.compile(text)
            for text in (entry.trial, entry.warmup, entry.start)
        ]

        def make() -> Format:
            trial, warmup, start = patterns
            assert trial is not None
            return Patterns(trial, warmup, start)

    name = entry.name or Path(entry.script or "").stem
    return Peer(name, tuple(command), shown, digest, work, make)
