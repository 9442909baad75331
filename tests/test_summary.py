"""summary.json and metrics.jsonl: written and read again, older and damaged ones included."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from resfast.errors import ResfastError
from resfast.runs import folder as records
from resfast.runs.epoch_row import EpochRow, read_rows
from resfast.runs.summary import Versions, read_run, read_seeds
from resfast.training.seeds import summarize
from tests.conftest import change, example_summary

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("**/summary.json"))
OF_SEVERAL = [file for file in FILES if list(file.parent.glob("*/summary.json"))]
ROW = EpochRow(
    epoch=1,
    lr=0.1,
    train_loss=1.5,
    train_accuracy=0.5,
    eval_set="val",
    eval_loss=1.25,
    eval_accuracy=0.625,
    images_per_second=100.0,
    train_seconds=0.5,
    eval_seconds=0.1,
)


@pytest.fixture
def whole(tiny):
    """The summary of a run as this version writes it: with every field."""
    now = records.circumstances()
    return example_summary(
        macs_by_pixels={12: 15000, 16: 20000},
        train_macs=3 * 48 * 20000,
        tta_select=1.0,
        tta_mirror=1.0,
        val_images=0,
        scored_on="test",
        whitening_seconds=0.125,
        final_eval_seconds=0.25,
        timed_seconds=1.875,
        total_seconds=4.0,
        timing_rule=records.TIMING_RULE,
        peak_memory_bytes=2**20,
        loader="resident",
        augment="crop=1",
        device_type="cpu",
        threads=now.threads,
        versions=now.versions,
        date=now.date,
    )


def test_a_summary_is_read_as_it_was_written(whole, tmp_path):
    records.write_summary(tmp_path, whole)
    found = read_run(tmp_path / records.SUMMARY)
    assert found == whole
    assert found.not_recorded() == []
    assert isinstance(found.versions, Versions)
    assert found.confusion == ((6, 2), (2, 6))
    assert found.macs_by_pixels == {12: 15000, 16: 20000}
    assert found.to_json() == (tmp_path / records.SUMMARY).read_text()


def test_the_summary_of_several_seeds_is_read_as_it_was_written(whole, tiny, tmp_path):
    other = replace(whole, seed=6, tta_accuracy=0.875, test_accuracy=0.875, stopped="max_seconds")
    summary = summarize([whole, other], change(tiny, runs=2), 0.8, 9.0, "several")
    records.write_summary(tmp_path, summary)
    found = read_seeds(tmp_path / records.SUMMARY)
    assert found == summary
    assert found.to_json() == (tmp_path / records.SUMMARY).read_text()
    assert found.accuracies == (0.8125, 0.875)
    assert found.test_accuracy == 0.8125
    assert (found.each[1].seed, found.each[1].tta_accuracy) == (6, 0.875)
    assert (found.seconds.timed.mean, found.seconds.timed.sd) == (1.875, 0.0)
    assert found.stopped == ("max_seconds",)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_the_summaries_of_older_versions_are_read(file: Path):
    written = json.loads(file.read_text())
    found = read_seeds(file) if file in OF_SEVERAL else read_run(file)
    assert dict(found).items() >= written.items()
    if list(found) == list(written):
        assert found.to_json() == file.read_text()
    if file not in OF_SEVERAL:
        rows = file.parent / records.METRICS
        assert len(read_rows(rows)) == found.epochs if rows.exists() else file.exists()


def test_some_of_these_are_of_the_first_version_and_one_is_of_several_seeds():
    assert OF_SEVERAL
    first = [f for f in FILES if f not in OF_SEVERAL and read_run(f).timed_seconds is None]
    assert first
    with pytest.raises(ResfastError, match=r"has no whitening_seconds, .*train it again"):
        read_run(first[0]).seconds_by_kind()


def test_what_an_older_version_left_out_is_none_and_an_unknown_field_is_ignored(whole, tmp_path):
    file = tmp_path / records.SUMMARY
    values = json.loads(whole.to_json())
    for name in ("tta_select", "macs_by_pixels", "versions", "val_accuracy"):
        del values[name]
    file.write_text(json.dumps(values | {"added_in_version_9": [1, {"a": 2}]}))
    found = read_run(file)
    assert found == replace(whole, tta_select=None, macs_by_pixels=None, versions=None)
    assert found.not_recorded() == ["macs_by_pixels", "tta_select", "versions"]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"params": "many"}, "params: Input should be a valid integer"),
        ({"best_on": "train"}, "best_on: Input should be 'test' or 'val'"),
        ({"versions": {"torch": "2.15.0"}}, "versions.resfast: Field required"),
        ({"confusion": [[6, 2], [2, None]]}, "confusion.1.1: Input should be a valid integer"),
        ({"per_class_accuracy": {"left": "x"}}, "per_class_accuracy.left: Input should be a valid"),
        ({"seed": None}, "seed: Input should be a valid integer"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_with_file_and_field(whole, tmp_path, values, field):
    file = tmp_path / records.SUMMARY
    file.write_text(json.dumps(json.loads(whole.to_json()) | values))
    with pytest.raises(ResfastError) as error:
        read_run(file)
    assert str(error.value).startswith(f"{file}: {field}")
    assert str(error.value).endswith("; expected the summary.json of a run")


def test_what_is_no_summary_is_an_error_with_the_file(tmp_path):
    file = tmp_path / records.SUMMARY
    with pytest.raises(ResfastError, match=r"cannot read .*summary\.json: No such file"):
        read_seeds(file)
    for content, reason in ((b"{", "is not JSON"), (b"[]", "the file: "), (b"\xff", "is not text")):
        file.write_bytes(content)
        with pytest.raises(ResfastError, match=rf"summary\.json:? {reason}.*of several runs"):
            read_seeds(file)


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [ROW, replace(ROW, epoch=2, eval_loss=None, eval_accuracy=None)]
    records.write_metrics(tmp_path, rows)
    file = tmp_path / records.METRICS
    assert read_rows(file) == rows
    assert json.loads(file.read_text().splitlines()[0])["eval_accuracy"] == 0.625
    file.write_text(file.read_text() + file.read_text().replace("0.1", '"fast"'))
    with pytest.raises(ResfastError, match=r"metrics\.jsonl, line 3: lr: Input should be a valid"):
        read_rows(file)


def test_json_has_no_infinite_and_no_undefined_numbers(whole, tmp_path):
    classes = {"left": 0.75, "right": math.nan}
    records.write_summary(tmp_path, replace(whole, test_loss=math.inf, per_class_accuracy=classes))
    records.write_metrics(tmp_path, [replace(ROW, eval_loss=math.nan)])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for name in (records.SUMMARY, records.METRICS):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
    found = read_run(tmp_path / records.SUMMARY)
    assert (found.test_loss, found.per_class_accuracy) == (None, {"left": 0.75, "right": None})
    # Python's json wrote NaN where an older version had no images of a class.
    (tmp_path / "old.json").write_text(whole.to_json().replace('"right": 0.75', '"right": NaN'))
    assert math.isnan(read_run(tmp_path / "old.json").per_class_accuracy["right"])


def test_names_that_are_not_utf_8_are_kept(whole, tmp_path):
    odd = replace(whole, run="caf\udce9", per_class_accuracy={"caf\udce9": 0.5, "\U0010f069": 1.0})
    records.write_summary(tmp_path, odd)
    assert read_run(tmp_path / records.SUMMARY) == odd


def test_older_code_reads_a_summary_as_a_dictionary(whole):
    assert whole["test_accuracy"] == whole.test_accuracy
    assert whole["versions"]["torch"] == whole.versions.torch
    assert whole["confusion"] == [[6, 2], [2, 6]]
    assert whole.get("finished") is None
    assert "to_json" not in whole
    assert {**whole} == json.loads(whole.to_json()) == whole
    with pytest.raises(KeyError):
        whole["to_json"]


def test_the_headline_accuracy_follows_what_was_scored(whole):
    assert whole.headline_accuracy() == ("tta_accuracy", 0.8125)
    assert replace(whole, tta="none").headline_accuracy() == ("test_accuracy", 0.75)
    held = replace(
        whole, test_accuracy=None, tta_accuracy=None, val_accuracy=0.5, val_tta_accuracy=0.625
    )
    assert held.headline_accuracy() == ("val_tta_accuracy", 0.625)
    assert replace(held, tta="none").headline_accuracy() == ("val_accuracy", 0.5)
    with pytest.raises(ResfastError, match="tiny has no accuracy"):
        replace(held, val_tta_accuracy=None).headline_accuracy()
