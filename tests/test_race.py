"""``benchmarks.race`` with small scripts instead of others' training, and one tiny recipe."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from itertools import groupby
from pathlib import Path

import pytest
import scipy.stats
import torch

from benchmarks.race import comparison, contenders, data, rows, sample
from benchmarks.race.__main__ import main
from benchmarks.race.formats import Event, Patterns, Table
from benchmarks.race.process import Process
from benchmarks.race.results import Race
from benchmarks.race.rows import Row
from resfast.data.sources import load_dataset
from resfast.errors import ResfastError
from tests.conftest import TINY_OPTIONS

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")

SCRIPT = """
import os, pathlib, signal, subprocess, sys, time

def line(*cells):
    print("".join(f"|  {cell}  " for cell in cells) + "|")

def work(seconds):
    with open(STEPS, "a") as file:
        for _ in range(round(seconds / 0.01)):
            time.sleep(0.01)  # short: a sleep goes on while the process is paused
            print(time.monotonic(), NAME, file=file, flush=True)

assert pathlib.Path("cifar10/train.pt").exists()
time.sleep(PREPARATION)
line("run   ", "epoch", "train_acc", "val_acc", "tta_val_acc", "time_seconds")
for run in ["warmup", *range(RUNS)]:
    work(SECONDS)
    line(f"{run}".rjust(6), "    1", "   0.9000", " 0.8000", "           ", "      0.0500")
    accuracy = 0.1 if run == "warmup" else 0.9 + 0.001 * run
    line("      ", " eval", "   0.9000", accuracy, accuracy + 0.01, "      0.1000")
    after(run)
"""


def write_peer(
    folder: Path,
    name: str,
    *,
    seconds: float = 0.05,
    runs: int = 200,
    preparation: float = 0.0,
    after: str = "pass",
) -> Path:
    """A script that prints trials as airbench does; ``after`` is code for the end of each."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.py"
    values = {"NAME": name, "SECONDS": seconds, "RUNS": runs, "PREPARATION": preparation}
    values["STEPS"] = str(folder.parent / "steps.txt")
    constants = "".join(f"{constant} = {value!r}\n" for constant, value in values.items())
    body = textwrap.indent(textwrap.dedent(after), "    ")
    path.write_text(f"{constants}def after(run):\n{body}\n{SCRIPT}")
    return path


@pytest.fixture
def race(image_tree: Path, tmp_path: Path) -> list[str]:
    """Arguments of a race between the scripts of ``tmp_path / "peers"``."""
    places = ["--data", f"folder:{image_tree}", "--data-dir", str(tmp_path / "data")]
    places += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    return ["--peers", str(tmp_path / "peers"), *places]


def read(tmp_path: Path) -> tuple[list[Row], Race]:
    out = tmp_path / "out"
    return rows.read(out), Race.model_validate_json((out / "race.json").read_bytes())


def phases(found: list[Row], name: str) -> list[str]:
    return [row.phase for row in found if row.contender == name]


# -- turns and the clock outside -------------------------------------------------------------------


def test_trials_alternate_and_pauses_do_not_count(race: list[str], tmp_path: Path):
    """The slow script works 0.4 s a trial, the fast one 0.1 s, and only in its own turns."""
    write_peer(tmp_path / "peers", "fast", seconds=0.1, preparation=0.3)
    write_peer(tmp_path / "peers", "slow", seconds=0.4)
    assert main([*race, "--trials", "3", "--block", "1"]) == 0
    found, result = read(tmp_path)
    trials = [row for row in found if row.phase == "trial"]
    assert [row.contender for row in trials] == ["fast", "slow", "slow", "fast", "fast", "slow"]
    assert [row.block for row in trials] == list(range(6))
    worked = [line.split()[1] for line in sorted((tmp_path / "steps.txt").read_text().splitlines())]
    turns = ["fast", "slow", "fast", "slow", "fast", "slow"]  # the first two are the warm-up
    assert [name for name, _ in groupby(worked)] == turns
    by_name = {name: [row for row in trials if row.contender == name] for name in ("fast", "slow")}
    for name, least in (("fast", 0.1), ("slow", 0.4)):
        for row in by_name[name]:
            assert row.seconds > 0.9 * least
    first, second, third = by_name["fast"]
    # Paused for the warm-up and a trial of the other, two trials of it, and not for its own turn.
    assert first.paused_seconds > 0.9 * 0.4
    assert second.paused_seconds > 0.9 * 2 * 0.4
    assert third.paused_seconds < 0.9 * 0.4
    for row in (first, second):
        assert row.seconds < row.paused_seconds
    for name in ("fast", "slow"):
        own = [row for row in found if row.contender == name]
        assert phases(found, name) == ["preparation", "warmup", *["trial"] * 3]
        assert own[1].label == "warmup"
        assert [row.label for row in own[2:]] == ["0", "1", "2"]
    fast = next(one for one in result.contenders if one.name == "fast")
    assert fast.preparation_seconds is not None
    assert fast.preparation_seconds.mean > 0.9 * 0.3
    assert fast.warmup_seconds is not None
    assert fast.warmup_seconds.mean > 0.9 * 0.1
    # One process, so the parts add up to the time of its first result, and to all it took.
    parts = [row.seconds for row in found if row.contender == "fast"]
    assert fast.first_result_seconds is not None
    assert fast.first_result_seconds.mean == pytest.approx(sum(parts[:3]))
    assert fast.seconds_with_warmup == pytest.approx(sum(parts) / 3)
    assert fast.seconds is not None
    assert fast.seconds.mean == pytest.approx(sum(parts[2:]) / 3)
    assert fast.tta_accuracy is not None
    assert fast.tta_accuracy.mean == pytest.approx(0.911)  # of runs 0 to 2, not of the warm-up
    assert (tmp_path / "out" / "race.png").stat().st_size > 0


def test_the_first_trials_of_a_process_are_warm_up_whatever_their_names(
    race: list[str], tmp_path: Path
):
    write_peer(tmp_path / "peers", "one", seconds=0.01)
    assert main([*race, "--trials", "1", "--warmup", "3"]) == 0
    found, _ = read(tmp_path)
    warmup = [row.label for row in found if row.phase == "warmup"]
    assert warmup == ["warmup", "0", "1"]
    assert [row.label for row in found if row.phase == "trial"] == ["2"]


def test_a_clock_that_runs_on_in_pauses_is_reported(race: list[str], tmp_path: Path):
    folder = tmp_path / "peers"
    write_peer(folder, "other", seconds=0.2)
    path = write_peer(folder, "late", seconds=0.01)
    path.write_text(path.read_text().replace("      0.1000", "      9.0000"))
    assert main([*race, "--trials", "2"]) == 0
    found, result = read(tmp_path)
    problems = {one.name: one.problems for one in result.contenders}
    assert problems["other"] == []
    assert "own seconds of 3 trials are more" in problems["late"][0]
    assert {
        row.own_seconds for row in found if row.contender == "late" and row.phase == "trial"
    } == {9.0}


# -- scripts that do not do what they should -------------------------------------------------------


def test_scripts_that_fail_say_nothing_or_stop_are_rows_and_the_others_go_on(
    race: list[str], tmp_path: Path
):
    folder = tmp_path / "peers"
    write_peer(folder, "good", seconds=0.01)
    write_peer(folder, "short", seconds=0.01, runs=2)
    (folder / "fails.py").write_text("raise RuntimeError('no GPU')\n")
    (folder / "mute.py").write_text("print('hello')\n")
    (folder / "silent.py").write_text("import time\ntime.sleep(600)\n")
    assert main([*race, "--trials", "3", "--block", "1", "--patience", "2"]) == 0
    found, result = read(tmp_path)
    ended = {row.contender: row for row in found if row.phase == "ended"}
    assert set(ended) == {"short", "fails", "mute", "silent"}
    assert "ended with code 1 and printed nothing" in ended["fails"].reason
    assert ended["fails"].tail[-1] == "RuntimeError: no GPU"
    assert "PEERS/fails.py" in ended["fails"].tail[1]
    assert str(tmp_path) not in (tmp_path / "out" / "trials.jsonl").read_text()
    assert ended["mute"].tail == ("hello",)
    assert "ended with code 0 and printed nothing" in ended["mute"].reason
    assert "no sign of a trial for 2 s" in ended["silent"].reason
    assert ended["short"].reason == "it ended with code 0 after 2 of 3 trials"
    assert phases(found, "short") == ["preparation", "warmup", "trial", "trial", "ended"]
    assert phases(found, "good") == ["preparation", "warmup", "trial", "trial", "trial"]
    page = (tmp_path / "out" / "race.md").read_text()
    for name in ended:
        assert f"- {name}: it " in page
    counts = {one.name: one.seconds and one.seconds.count for one in result.contenders}
    assert counts == {"good": 3, "short": 2, "fails": None, "mute": None, "silent": None}


@LINUX
def test_an_interrupted_race_keeps_its_rows_leaves_no_process_and_can_be_resumed(
    race: list[str], tmp_path: Path
):
    """A script starts a process in a session of its own, and interrupts the race in its trial 1."""
    folder, child, again = tmp_path / "peers", tmp_path / "child", tmp_path / "again"
    after = f"""
        if run == "warmup":
            child = subprocess.Popen(["sleep", "600"], start_new_session=True)
            pathlib.Path({str(child)!r}).write_text(str(child.pid))
        if run == 1 and not pathlib.Path({str(again)!r}).exists():
            work(0.5)  # the row of this trial is written meanwhile
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(60)
    """
    write_peer(folder, "a", seconds=0.01)
    script = write_peer(folder, "b", seconds=0.01, after=after)
    arguments = [*race, "--trials", "4", "--block", "2"]
    assert main(arguments) == 130
    found, result = read(tmp_path)
    assert phases(found, "b") == ["preparation", "warmup", "trial", "trial"]
    assert phases(found, "a") == ["preparation", "warmup", "trial", "trial"]
    assert [one.seconds.count for one in result.contenders if one.seconds] == [2, 2]
    assert living(tmp_path) == []
    assert not alive(int(child.read_text()))

    assert main(arguments) == 2  # not without --resume
    again.touch()
    kept = script.read_text()
    script.write_text(kept + "# changed\n")
    assert main([*arguments, "--resume"]) == 2
    script.write_text(kept)
    assert len(rows.read(tmp_path / "out")) == len(found)
    assert main([*arguments, "--resume"]) == 0
    more, result = read(tmp_path)
    assert more[: len(found)] == found
    for name in "ab":
        assert phases(more, name)[4:] == ["preparation", "warmup", "trial", "trial"]
        assert [row.session for row in more if row.contender == name] == [0] * 4 + [1] * 4
    assert not alive(int(child.read_text()))
    blocks = [row.block for row in more if row.phase == "trial"]
    assert blocks == sorted(blocks)
    assert {
        one.preparation_seconds.count for one in result.contenders if one.preparation_seconds
    } == {2}
    assert living(tmp_path) == []


def living(folder: Path) -> list[str]:
    """Processes that run below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")).is_relative_to(folder):
                found.append(process.name)
        except OSError:  # it ended, or is another user's
            continue
    return found


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@LINUX
def test_a_paused_process_ends_with_a_race_that_is_killed(tmp_path: Path):
    program = (
        "import os, signal, pathlib\n"
        "from benchmarks.race.process import Process\n"
        "command = ['sh', '-c', 'echo ready; exec sleep 600']\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "one = Process(command, folder, folder / 'log')\n"
        "assert one.next_line(60).text == 'ready'\n"
        "one.pause()\n"
        "print(one._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 10
    while alive(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(int(done.stdout))


@LINUX
def test_a_process_that_starts_others_is_paused_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """It may wait in vfork for a child that was stopped before it became another program."""
    program = "import subprocess\nprint('ready')\nwhile True: subprocess.call(['true'])"
    process = Process([sys.executable, "-c", program], tmp_path, tmp_path / "log")
    line = process.next_line(60)
    assert line is not None
    assert line.text == "ready"
    begin = time.monotonic()
    for _ in range(20):
        process.pause()
        process.resume()
        time.sleep(0.005)
    process.kill()
    assert time.monotonic() - begin < 5
    assert "does not stop" not in caplog.text


def test_a_command_that_does_not_exist_ends_with_a_reason(tmp_path: Path):
    process = Process(["no-such-command"], tmp_path, tmp_path / "log")
    line = process.next_line(30)
    assert line is not None
    assert line.text == "cannot run no-such-command: No such file or directory"
    assert process.next_line(30) is None
    assert (process.ended, process.code) == (True, 1)
    process.kill()


def test_carriage_returns_end_lines_and_streams_are_not_mixed(tmp_path: Path):
    """Some scripts rewrite a status line before a row of their table."""
    program = (
        "import sys; sys.stderr.write('10%'); sys.stderr.flush();"
        "print('mean 1', end='\\r', flush=True); print('| row |'); print(' last', end='')"
    )
    process = Process([sys.executable, "-c", program], tmp_path, tmp_path / "log")
    texts = []
    while (line := process.next_line(30)) is not None:
        texts.append(line.text)
    process.kill()
    assert sorted(texts) == [" last", "10%", "mean 1", "| row |"]
    assert (tmp_path / "log").read_text().count("\t") == 4


# -- formats ---------------------------------------------------------------------------------------

HEAD = "|  run     |  epoch  |  train_acc  |  val_acc  |  tta_val_acc  |  time_seconds  |"


def test_the_table_of_airbench_is_read():
    table = Table()
    assert table.read("-" * 80) is None
    assert table.read("| a | b |") is None
    assert table.read(HEAD) == Event("start")
    row = "|  {:>6}  |  {:>5}  |     0.9000  |   {}  |       {:>6}  |  {:>12}  |"
    assert table.read(row.format("warmup", 1, "0.1000", "", "0.9")) == Event(
        "label", "warmup", True
    )
    assert table.read(row.format("", 2, "0.1000", "", "1.8")) is None
    assert table.read(row.format("", "eval", "0.1234", "0.1300", "2.0")) == Event(
        "end", "warmup", True, 0.1234, 0.13, 2.0
    )
    # A script with one row a trial, and one that never names them.
    assert table.read(row.format("7", "eval", "0.9317", "0.9399", "2.0194")) == Event(
        "end", "7", False, 0.9317, 0.9399, 2.0194
    )
    assert table.read(row.format("", "eval", "   nan", "", "")) == Event("end")


def test_other_columns_of_that_family_are_read():
    table = Table()
    head = "| run | epoch | train_loss | train_acc | test_acc | tta_test_acc | total_time_seconds |"
    assert table.read(head) == Event("start")
    assert table.read("| 0 | eval | 1.2 | 0.99 | 95.51 | 96.01 | 27.3 |") == Event(
        "end", "0", False, pytest.approx(0.9551), pytest.approx(0.9601), 27.3
    )


def test_patterns_of_a_peers_file_are_read_and_run(race: list[str], tmp_path: Path):
    folder = tmp_path / "peers"
    folder.mkdir()
    (folder / "train.py").write_text(
        "import sys\nprint('go', sys.argv[1:])\nprint('warming up')\n"
        "for seed in range(9):\n    print(f'seed {seed}: 91.5% (92.5%) in 0.25 s')\n"
    )
    (folder / "peers.toml").write_text(
        "[[peer]]\nname = 'theirs'\n"
        f"command = '{sys.executable} {{folder}}/train.py --fast'\nstart = '^go'\n"
        "warmup = '^warming'\n"
        "trial = '^seed (?P<label>\\d+): (?P<accuracy>[\\d.]+)% "
        "\\((?P<tta_accuracy>[\\d.]+)%\\) in (?P<seconds>[\\d.]+)'\n"
    )
    assert main([*race, "--trials", "2", "--warmup", "0"]) == 0
    found, result = read(tmp_path)
    assert phases(found, "theirs") == ["preparation", "warmup", "trial", "trial"]
    last = found[-1]
    assert (last.label, last.accuracy, last.tta_accuracy) == ("2", 0.915, 0.925)
    assert last.own_seconds == 0.25
    (one,) = result.contenders
    assert one.command == f"{sys.executable} {{folder}}/train.py --fast"


def test_a_line_can_be_both_warm_up_and_trial():
    patterns = Patterns(re.compile(r"done"), re.compile(r"warm"))
    assert patterns.read("warm done") == Event("end", None, True)
    assert patterns.read("done") == Event("end")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[peer", "cannot read"),
        ("peers = 1", "expected"),
        ("[[peer]]\nname = 'a'", "either script or command"),
        ("[[peer]]\nscript = 'a.py'\ntime = 'x'", "time"),
        ("[[peer]]\nscript = 'a.py'\ntrial = '('", "no regular expression"),
        ("[[peer]]\nscript = 'a.py'\nstart = 'x'", "need trial"),
        ("[[peer]]\ncommand = 'a'", "needs a name"),
        ("[[peer]]\nscript = 'missing.py'", "missing.py"),
        (None, "no Python script"),
    ],
)
def test_a_bad_folder_of_peers_is_refused(tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "peers.toml").write_text(text)
    with pytest.raises(ResfastError, match=message):
        contenders.peers(tmp_path, tmp_path)


def test_peers_are_chosen_by_name(tmp_path: Path):
    for name in ("a", "b", "_helper"):
        (tmp_path / f"{name}.py").touch()
    assert [peer.name for peer in contenders.peers(tmp_path, tmp_path)] == ["a", "b"]
    assert [peer.name for peer in contenders.peers(tmp_path, tmp_path, ["b"])] == ["b"]
    with pytest.raises(ResfastError, match="no peer 'c'"):
        contenders.peers(tmp_path, tmp_path, ["c"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trials", "0"], "--trials 0"),
        (["--target-ratio", "nan"], "--target-ratio"),
        (["--recipes", "fast49"], "unknown recipe"),
        (["--recipes", "fast94", "--", "--seed", "3"], "set by the race"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    race: list[str],
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
):
    write_peer(tmp_path / "peers", "one")
    assert main([*race, *options]) == 2
    assert message in capsys.readouterr().err
    assert rows.read(tmp_path / "out") == []


# -- data ------------------------------------------------------------------------------------------


def test_scripts_get_the_images_of_the_data_set(image_tree: Path, tmp_path: Path):
    dataset = load_dataset(f"folder:{image_tree}", data_dir=tmp_path / "data")
    data.write(dataset, tmp_path)
    train, test = (tmp_path / "cifar10" / name for name in ("train.pt", "test.pt"))
    for path, split in ((train, "train"), (test, "test")):
        content = torch.load(path)
        assert torch.equal(content["images"], getattr(dataset, f"{split}_images"))
        assert (content["images"].dtype, content["labels"].dtype) == (torch.uint8, torch.int64)
        assert torch.equal(content["labels"], getattr(dataset, f"{split}_labels"))
        assert content["classes"] == ["left", "right"]
    assert torch.load(train)["images"].shape == (48, 32, 32, 3)
    before = train.stat().st_ino
    test.write_bytes(test.read_bytes()[:-100])
    data.write(dataset, tmp_path)
    assert train.stat().st_ino == before  # it had the images already
    assert torch.equal(torch.load(test)["images"], dataset.test_images)


# -- statistics ------------------------------------------------------------------------------------


def test_a_ratio_of_means_has_the_interval_of_fieller():
    """By hand: t(0.975, 4) = 2.77645, squared standard errors 1/3 and 4/3, means 2 and 4."""
    found = comparison.ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx((0.09245, 2.7039), rel=1e-3)


def test_a_ratio_without_spread_or_with_one_value():
    assert comparison.ratio([1.0, 1.0], [2.0, 2.0]) == comparison.Estimate(0.5, 0.5, 0.5)
    assert comparison.ratio([1.0], [2.0, 3.0]) == comparison.Estimate(0.4, None, None)
    assert comparison.ratio([1.0, 2.0], [0.1, 9.0]).low is None  # its mean could be 0


OURS, THEIRS = [2.01, 2.07, 1.98, 2.11, 2.05], [2.62, 2.58, 2.64]


@pytest.mark.parametrize("target", [0.6, 0.78, 0.8, 1.0])
def test_the_p_value_is_that_of_scipys_welch_test(target: float):
    scaled = [target * value for value in THEIRS]
    expected = scipy.stats.ttest_ind(OURS, scaled, equal_var=False, alternative="less").pvalue
    assert comparison.p_faster(OURS, THEIRS, target) == pytest.approx(expected, rel=1e-9)


def test_the_difference_is_that_of_scipys_welch_interval():
    found = comparison.difference(OURS, THEIRS)
    expected = scipy.stats.ttest_ind(OURS, THEIRS, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.mark.parametrize(("target", "expected"), [(0.4, 1.0), (0.5, 0.5), (0.6, 0.0)])
def test_trials_without_spread_decide_by_their_mean(target: float, expected: float):
    assert comparison.p_faster([1.0, 1.0], [2.0, 2.0], target) == expected
    assert comparison.p_faster([1.0], [2.0], target) is None


# -- the machine -----------------------------------------------------------------------------------

SMI = """#!/bin/sh
case "$*" in
*clocks.max.sm*) echo "Some GPU, 600.1, 1980, 700.00" ;;
*utilization.gpu*) if [ -e {busy} ]; then rm {busy}; echo 35; else echo 0; fi ;;
*) echo "1755, 2619, 41, [N/A]" ;;
esac
"""


def test_clocks_and_temperature_come_from_nvidia_smi(
    race: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    busy = tmp_path / "busy"
    busy.touch()
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(SMI.format(busy=busy))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    write_peer(tmp_path / "peers", "one", seconds=0.01)
    assert main([*race, "--trials", "1"]) == 0
    assert not busy.exists()  # it waited until the GPU was idle
    found, result = read(tmp_path)
    last = found[-1].sample
    assert (last.sm_mhz, last.memory_mhz, last.gpu_celsius, last.gpu_watts) == (
        1755,
        2619,
        41,
        None,
    )
    assert last.load is not None
    assert result.hardware["gpu"] == "Some GPU"
    assert result.hardware["driver"] == "600.1"
    assert "| one | 1755 | 41 |" in (tmp_path / "out" / "race.md").read_text()


def test_without_a_gpu_only_the_cpu_is_recorded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    sampler = sample.Sampler()
    assert sampler.gpu == {}
    found = sampler.sample()
    assert (found.sm_mhz, found.load is None) == (None, False)
    sampler.wait_until_idle()


# -- our recipes -----------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_a_recipe_races_a_script_on_the_same_images(race: list[str], tmp_path: Path):
    options = " ".join(TINY_OPTIONS).replace("--image-size 16", "--tta flip --epochs 1").split()
    write_peer(tmp_path / "peers", "theirs", seconds=0.01)
    assert (
        main([*race, "--recipes", "default", "--trials", "2", "--block", "1", "--", *options]) == 0
    )
    found, result = read(tmp_path)
    ours = [row for row in found if row.contender == "default"]
    assert [row.phase for row in ours] == ["preparation", "warmup", "trial", "trial"]
    assert [row.label for row in ours[1:]] == ["seed 0", "seed 1", "seed 2"]
    for number, row in enumerate(ours[1:]):
        (path,) = (tmp_path / "work" / "runs").glob(f"*/seed{number}/summary.json")
        summary = json.loads(path.read_text())
        assert row.accuracy == summary["test_accuracy"]
        assert row.tta_accuracy == summary["tta_accuracy"]
        assert row.own_seconds == summary["timed_seconds"]
        assert row.own_seconds < row.seconds
        assert summary["data_digest"] == result.data_digest
    by_clock = {pair.clock: pair for pair in result.comparisons}
    assert set(by_clock) == {"outside", "own"}
    seconds = {
        name: [row.seconds for row in found if (row.contender, row.phase) == (name, "trial")]
        for name in ("default", "theirs")
    }
    expected = comparison.ratio(seconds["default"], seconds["theirs"])
    assert by_clock["outside"].ratio.value == pytest.approx(expected.value)
    assert by_clock["outside"].p_value == pytest.approx(
        comparison.p_faster(seconds["default"], seconds["theirs"], 1.0)
    )
    assert by_clock["own"].accuracy_difference is not None
    page = (tmp_path / "out" / "race.md").read_text()
    assert "| default | theirs | outside |" in page
    assert str(tmp_path) not in page
