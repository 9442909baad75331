"""Plots show names from outside as they are, and never fail a run."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFont

from resfast.data import preview
from resfast.runs import plots
from resfast.runs.epoch_row import EpochRow

ROW = EpochRow(
    epoch=1,
    lr=0.1,
    train_loss=1.0,
    train_accuracy=0.5,
    eval_set="test",
    eval_loss=1.0,
    eval_accuracy=0.5,
    images_per_second=100.0,
    train_seconds=1.0,
    eval_seconds=0.1,
)
NAMES = ("$1_$5", r"\$x^$", "$\\bad{$", "caf\udce9", "a\nb", "\x00\x1b[0m", "plain_name")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_name_of_a_class_or_a_run_can_be_drawn(name: str, tmp_path: Path, caplog):
    plots.save_confusion(tmp_path / "confusion.png", torch.eye(2).long(), (name, "other"))
    plots.save_curves(tmp_path / "curves.png", [ROW], name)
    assert not caplog.records
    for file in ("confusion.png", "curves.png"):
        Image.open(tmp_path / file).verify()


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("$1_$5", r"\$1_\$5"),
        ("caf\udce9", "caf\ufffd"),
        ("a\nb", "a\ufffdb"),
        ("caf\xe9 \u732b", "caf\xe9 \u732b"),
    ],
)
def test_a_name_is_drawn_as_plain_text(name: str, drawn: str):
    assert plots.plain(name) == drawn
    axes = plots._confusion(torch.eye(2).long(), (name, "other")).axes[0]
    label = axes.get_xticklabels()[0]
    assert label.get_text() == drawn
    assert label._preprocess_math(drawn) == (drawn.replace(r"\$", "$"), False)


def test_a_plot_that_fails_is_logged_and_leaves_no_old_one(tmp_path: Path, monkeypatch, caplog):
    def fail(*args: object) -> None:
        raise ValueError("no such font\nand more")

    monkeypatch.setattr(plots, "save", fail)
    path = tmp_path / "curves.png"
    path.write_bytes(b"of an earlier result")
    with caplog.at_level(logging.WARNING, logger="resfast"):
        plots.save_curves(path, [ROW], "run")
        plots.save_confusion(tmp_path / "confusion.png", torch.eye(2).long(), ("a", "b"))
    assert caplog.messages == [
        f"continuing without the plot {tmp_path / name}: no such font"
        for name in ("curves.png", "confusion.png")
    ]
    assert not path.exists()


@pytest.mark.parametrize("name", NAMES)
def test_any_name_fits_the_contact_sheet(name: str):
    font = ImageFont.load_default()
    sheet = preview._Sheet(1, 32, 32)
    sheet.heading(name, name)
    sheet.captions([[name]])
    assert preview._shortened(name, font, 1000).isprintable()
    assert sheet.finish().width == sheet.width
