"""A recipe whose values depend on the number of epochs, the network, the data and other options."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import resfast
from resfast.cli.train import command_line, main
from resfast.config import files
from resfast.config.network import network
from resfast.config.recipes import FAMILIES, RECIPES, decide, read, recipe
from resfast.config.recipes.conditions import CONDITIONS
from resfast.config.recipes.family import decide_by, interpolated
from resfast.config.schema import Config
from resfast.config.validate import check
from resfast.errors import ResfastError
from resfast.models.presets import PRESETS, build_model
from resfast.models.vgg import VGGSpec
from resfast.optim.optimizers import build_optimizer
from resfast.optim.schedules import Schedule
from resfast.training.loop import Interrupted, train
from resfast.training.resolve import resolve
from tests.conftest import change, interrupt_at

DEFAULT = FAMILIES["default"]
EARLY = ["filter_keep", "batch_size", "accumulate", "eval_every", "fuse"]
"""What depends on the data."""


class Data:
    """What ``resolve`` asks of a data set."""

    name, image_size = "some", 32


def resolved(config: Config, images: int, monkeypatch: pytest.MonkeyPatch, loader="resident"):
    monkeypatch.setattr("resfast.training.resolve.choose_loader", lambda *_: loader)
    return resolve(change(config, device="cpu"), Data(), images)


# -- values by epochs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "epochs", "expected"),
    [
        ((0.5, 1.0, 0.2), 4, 0.5),
        ((0.5, 1.0, 0.2), 16, 1.0),
        ((0.5, 1.0, 0.2), 8, 0.75),  # half way in the logarithm
        ((0.5, 1.0, 0.2), 32, 0.6),
        ((0.5, 1.0, 0.2), 5, 0.5805),  # 0.5 + 0.5 log(5 / 4) / log(4), to 4 digits
        ((0.5, 1.0, 0.2), 5.5, 0.6149),
        ((0.5, 1.0, 0.2), 1, 0.5),
        ((0.5, 1.0, 0.2), 300, 0.2),
        ((1, 4, 8), 8, 2),
        ((1, 4, 8), 9, 3),
        (("a", "b", "c"), 8, "a"),  # as near to both: the shorter's
        (("a", "b", "c"), 8.1, "b"),
        (("a", "b", "c"), 33, "c"),
        ((True, False, True), 15, False),
        ((((8, 0.5),), (), ((9, 0.5),)), 5, ((8, 0.5),)),
        ((None, 0.5, 1.0), 5, None),
    ],
)
def test_values_between_lengths(values: tuple, epochs: float, expected: object):
    found = interpolated((4, 16, 64), values, epochs)
    assert (found, type(found)) == (expected, type(expected))


def test_one_length_is_for_all_epochs():
    assert interpolated((28,), (0.5,), 3) == interpolated((28,), (0.5,), 200) == 0.5


@pytest.mark.parametrize(
    ("epochs", "keep", "augment"),
    [
        (2, 1.0, "crop=2,flip=alternating"),
        (8, 0.6845, "crop=2,flip=alternating"),
        (28, 0.5, "crop=4,flip=alternating,cutout=8"),
        (45, 0.6295, "crop=4,flip=alternating,cutout=12"),
        (300, 0.9, "crop=4,flip=alternating,cutout=16"),
    ],
)
def test_default_follows_the_number_of_epochs(epochs: int, keep: float, augment: str):
    for config in (
        recipe("default", epochs=epochs),
        command_line(["--epochs", str(epochs)])[1],
        decide(change(RECIPES["default"], epochs=epochs)),
    ):
        assert config.optim.epochs == epochs
        assert config.data.filter_keep == keep
        assert str(config.data.augment) == augment
        assert sorted(config.undecided) == sorted(EARLY)
        check(config)


def test_decided_values_do_not_follow_other_epochs(tmp_path: Path):
    config = decide(recipe("default", epochs=28), train_images=50_000, streamed=False)
    assert decide(change(config, epochs=4)) == change(config, epochs=4)
    (tmp_path / "config.json").write_text(files.to_json(config))
    resumed = command_line(["--resume", str(tmp_path), "--epochs", "70"])[1]
    assert resumed == change(config, epochs=70)


@pytest.mark.parametrize("epochs", [4, 28, 70])
def test_values_of_a_recipe_do_not_follow_other_epochs(
    epochs: int, monkeypatch: pytest.MonkeyPatch
):
    config = change(recipe("default", epochs=epochs), epochs=8)
    found, _ = resolved(config, 50_000, monkeypatch)
    assert (found.optim.epochs, found.recipe_epochs) == (8, epochs)
    assert found.data.filter_keep == DEFAULT.at("filter_keep", epochs)
    assert found.data.augment == DEFAULT.at("augment", epochs)
    assert resolved(config, 500, monkeypatch)[0].data.filter_keep == 1.0


def test_deciding_again_changes_nothing():
    config = recipe("default", epochs=28)
    assert decide(config) == config
    again = files.from_json(files.to_json(config), "x")
    assert again == config
    assert decide(again, train_images=100, streamed=False) == decide(
        config, train_images=100, streamed=False
    )


# -- options win -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        "--filter-keep 0.75",  # as written
        "--filter-keep=0.75",
        "--filter_keep 0.75",
        "--filter-keep 0.9",
    ],
)
@pytest.mark.parametrize("epochs", ["", "--epochs 4", "--epochs 28", "--epochs 70"])
def test_an_option_is_kept_at_any_length(
    options: str, epochs: str, monkeypatch: pytest.MonkeyPatch
):
    config = command_line([*options.split(), *epochs.split()])[1]
    for images in (500, 50_000):
        found, _ = resolved(config, images, monkeypatch)
        assert found.data.filter_keep == (0.9 if "0.9" in options else 0.75)
        assert found.undecided == ()


def test_options_of_every_kind_are_kept(monkeypatch: pytest.MonkeyPatch):
    line = "--epochs 4 --optimizer muon --normalize-filters --batch-size 500 --sizes 16:0.3,24:0.7 "
    line += "--model vgg-a-bn --augment crop=4,flip=alternating,cutout=12 --eval-every 0"
    found, _ = resolved(command_line(line.split())[1], 800, monkeypatch)
    assert found.data.sizes == ((16, 0.3), (24, 0.7))
    assert str(found.data.augment) == "crop=4,flip=alternating,cutout=12"
    assert (found.optim.batch_size, found.evaluation.eval_every) == (500, 0)
    plain = "--no-normalize-filters --norm none --optimizer muon".split()
    assert not command_line(plain)[1].optim.normalize_filters


def test_changed_values_of_a_recipe_are_kept(monkeypatch: pytest.MonkeyPatch):
    config = change(recipe("default"), filter_keep=0.6, lr=0.2, epochs=4)
    found, _ = resolved(config, 500, monkeypatch)
    assert (found.data.filter_keep, found.optim.lr) == (0.6, 0.2)
    assert str(found.data.augment) == "crop=2,flip=alternating"
    config = change(recipe("default", epochs=28), filter_keep=0.6)
    assert resolved(config, 500, monkeypatch)[0].data.filter_keep == 0.6
    # Given to recipe, a value is kept even if it is the one that is written.
    config = recipe("default", epochs=4, filter_keep=0.75)
    assert resolved(config, 500, monkeypatch)[0].data.filter_keep == 0.75


def test_recipe_takes_options_by_name():
    config = resfast.recipe("default", epochs=16, model="speednet-94", image_size=48)
    assert (config.model.model, config.optim.head_lr) == ("speednet-94", 0.41)
    assert config.data.sizes == ((24, 0.3), (36, 0.7))
    assert resfast.recipe("fast94", epochs=9) == change(RECIPES["fast94"], epochs=9)
    assert resfast.recipe("default") == RECIPES["default"]
    with pytest.raises(ResfastError, match="no value 'filter_kep'; did you mean 'filter_keep'"):
        resfast.recipe("default", filter_kep=1.0)


# -- network, data and other options ---------------------------------------------------------------


def changed(options: str) -> dict[str, Any]:
    """What options change in the values that ``default`` decides."""
    found, usual = command_line(options.split())[1], command_line([])[1]
    pairs = {n: [getattr(getattr(c, g), n) for c in (found, usual)] for n, g in group_of().items()}
    return {name: new for name, (new, old) in pairs.items() if new != old}


def group_of() -> dict[str, str]:
    groups = ("model", "data", "optim", "evaluation")
    return {
        f.name: g
        for g in groups
        for f in dataclasses.fields(getattr(Config(), g))
        if f.name in DEFAULT.fields
    }


SGD = {
    "optimizer": "sgd",
    "lr": 0.125,
    "head_lr": None,
    "bias_lr": None,
    "momentum": 0.9,
    "sgd_momentum": None,
    "weight_decay": 5e-4,
    "head_weight_decay": None,
    "bias_weight_decay": None,
    "newton_schulz_steps": 5,
    "normalize_filters": False,
    "ema": 0.995,
    "batch_size": None,
    "accumulate": 1,
    "schedule": "onecycle",
    "anneal": "linear",
    "warmup": 0.2,
    "start_factor": 0.1,
    "end_factor": 0.001,
}
"""What other optimizers than Muon change; until this family, default had these values."""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--model resnet-453", {}),
        (
            "--model speednet-94",
            {
                "whitening_padding": "same",
                "head_std": 0.035,
                "norm_momentum": 0.15,
                "head_lr": 0.41,
                "bias_lr": 26.5,
            },
        ),
        ("--model vgg-a-bn", {"sizes": ()}),
        ("--model cnn", SGD | {"sizes": (), "freeze_norm_scale": False}),
        ("--norm none", SGD | {"freeze_norm_scale": False}),
        ("--optimizer sgd", SGD),
        ("--optimizer adamw --lr 0.001", SGD | {"optimizer": "adamw", "lr": 0.001}),
        (
            "--schedule multistep --milestones 3",
            {n: SGD[n] for n in ("anneal", "warmup", "start_factor", "end_factor")}
            | {"schedule": "multistep"},
        ),
        ("--schedule cosine", {"schedule": "cosine"}),
        ("--zero-init-residual", {"freeze_norm_scale": False}),
        ("--pretrain barlow_twins", SGD | {"sizes": (), "filter_keep": 1.0}),
        (
            "--init-from some.pth",
            SGD | {"sizes": (), "filter_keep": 1.0, "activation": None, "freeze_norm_scale": None},
        ),
        ("--batch-size 64", {"batch_size": 64, "accumulate": 1}),
        ("--early-stop 3", {"eval_every": 1}),
        ("--target 0.9", {"eval_every": 1}),
        ("--target 0.9 --runs 2", {}),
        ("--val-fraction 0.1", {"eval_every": 1}),
    ],
)
def test_default_suits_the_network_and_other_options(options: str, expected: dict):
    assert changed(options) == expected
    check(command_line(options.split())[1])


@pytest.mark.parametrize(
    ("size", "sizes", "augment"),
    [
        (64, ((32, 0.3), (48, 0.7)), "crop=8,flip=alternating,cutout=16"),
        (28, ((14, 0.3), (21, 0.7)), "crop=4,flip=alternating,cutout=7"),
        (16, ((12, 0.7),), "crop=2,flip=alternating,cutout=4"),
        (8, (), "crop=1,flip=alternating,cutout=2"),
    ],
)
def test_pixels_are_scaled_with_the_images(size: int, sizes: tuple, augment: str):
    config = recipe("default", epochs=28, image_size=size)
    assert (config.data.sizes, str(config.data.augment)) == (sizes, augment)
    kept = command_line(f"--image-size {size} --epochs 28 --sizes 8:0.5 --augment light".split())[1]
    assert kept.data.sizes == ((8, 0.5),)
    assert str(kept.data.augment) == str(Config().data.augment)


def test_the_weights_of_a_run_keep_their_activation(tmp_path: Path):
    (tmp_path / "config.json").write_text(files.to_json(recipe("default", epochs=28)))
    same = command_line(["--init-from", str(tmp_path)])[1]
    assert (same.model.activation, same.optim.optimizer) == ("gelu", "sgd")
    relu = files.to_json(recipe("report-onecycle"))
    (tmp_path / "config.json").write_text(relu)
    assert command_line(["--init-from", str(tmp_path)])[1].model.activation is None


def test_a_small_data_set_has_small_batches_and_trains_on_all_images(
    monkeypatch: pytest.MonkeyPatch,
):
    found, (note, *_) = resolved(recipe("default"), 1000, monkeypatch)
    assert found.undecided == ()
    assert (found.optim.epochs, found.optim.batch_size, found.optim.accumulate) == (14, 64, 1)
    assert (found.data.filter_keep, found.evaluation.eval_every) == (1.0, 1)
    assert not found.evaluation.fuse
    assert str(found.data.augment) == str(DEFAULT.at("augment", 14))
    assert "70 epochs to 14, batch size 500 to 64 (set --epochs and --batch-size" in note
    found, _ = resolved(recipe("default"), 40, monkeypatch)
    assert found.optim.batch_size == 40
    found, notes = resolved(recipe("default"), 50_000, monkeypatch)
    assert (found.optim.epochs, found.optim.batch_size, found.optim.accumulate) == (70, 500, 2)
    assert not any("adapted" in note for note in notes)
    sgd = change(recipe("default"), optimizer="sgd")  # by the rule of recipes without a batch size
    found, _ = resolved(decide(sgd), 1000, monkeypatch)
    assert (found.optim.batch_size, found.optim.lr) == (64, 0.0625)


def test_images_in_a_fixed_order_are_all_trained_on(monkeypatch: pytest.MonkeyPatch):
    found, _ = resolved(recipe("default", epochs=28), 50_000, monkeypatch, loader="dali")
    assert found.data.filter_keep == 1.0
    given = change(recipe("default", epochs=28), filter_keep=0.6)
    with pytest.raises(ResfastError, match="--filter-keep needs --loader resident"):
        resolved(given, 50_000, monkeypatch, loader="dali")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_default_fits_every_network(name: str):
    for epochs in (2, 28, 200):
        config = recipe("default", epochs=epochs, model=name, param_budget=0)
        check(config)
    assert config.model.model == name


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "epochs = [4, 12",
            "epochs = [12, 4",
            "by_epochs.epochs is [12, 4, 28, 70, 200]",
        ),
        ("epochs = [4, 12", "epochs = [4, 4", "expected a list of increasing numbers of epochs"),
        ("epochs = [4, 12", "epochs = [0.5, 12", "at least 1"),
        ("epochs = [4, 12, 28, 70, 200]\n", "", "by_epochs.epochs is None"),
        (
            "filter_keep = [1.0, 0.5,",
            "filter_keep = [1.0,",
            "by_epochs.filter_keep has 4 values for 5 lengths",
        ),
        ("filter_keep = [", "filter_keep = 0.5 #", "filter_keep has no list of values for 5"),
        ("filter_keep = [1.0", "filter_keep = [1.5", "by_epochs.filter_keep: data.filter_keep"),
        ("filter_keep = [1.0", 'filter_keep = ["x"', "by_epochs.filter_keep: data.filter_keep"),
        ("filter_keep = [", "filter_kep = [", "'filter_kep' is not a field that can vary; did you"),
        ("filter_keep = [", "image_size = [", "'image_size' is not a field that can vary"),
        ('"crop=2,flip=alternating",\n', '"crop=-2",\n', "crop=-2 is out of range"),
        (
            "[when.small_data]",
            "[when.small]",
            "when.small: unknown condition; did you",
        ),
        ("batch_size = 64", "batch_size = 0", "when.small_data.batch_size: optim.batch_size"),
        ("batch_size = 64", "batch_sise = 64", "'batch_sise' is not a field that can vary"),
        ('    "head_lr",\n', '    "ema",\n', "when.other_optimizer.unset: optim.ema"),
        ('    "head_lr",\n', '    "head",\n', "when.other_optimizer.unset: model.head"),
    ],
)
def test_damaged_tables_are_refused(old: str, new: str, message: str, tmp_path: Path):
    text = Path(resfast.config.recipes.__file__).with_name("default.toml").read_text("utf-8")
    assert old in text
    path = tmp_path / "default.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ResfastError, match=re.escape(message)) as error:
        read(path)
    assert str(path) in str(error.value)


def test_every_condition_is_used():
    assert {condition for condition, _ in DEFAULT.when} == CONDITIONS.keys()


def test_undecided_values_need_their_recipe():
    config = dataclasses.replace(RECIPES["default"], recipe="none")
    with pytest.raises(ResfastError, match=r"undecided activation.* of the unknown recipe 'none'"):
        decide(config)
    with pytest.raises(ResfastError, match="undecided has 'tf32', on which nothing depends"):
        decide(dataclasses.replace(RECIPES["default"], undecided=("tf32",)))


def test_tables_apply_in_their_order_and_see_earlier_values():
    family = dataclasses.replace(
        DEFAULT,
        when=(
            ("no_norm", {"optimizer": "adam"}),
            ("other_optimizer", {"lr": 0.5}),
            ("vgg", {"lr": 0.25}),
        ),
    )
    config = dataclasses.replace(family.written, undecided=family.fields)
    for options, lr in (({}, 0.12), ({"norm": "none"}, 0.5), ({"model": "cnn"}, 0.25)):
        assert decide_by({"default": family}, change(config, **options)).optim.lr == lr


def test_the_list_shows_the_lengths(capsys: pytest.CaptureFixture[str]):
    assert main(["--list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["epochs", "4", "12", "28", "70", "200"] in lines
    assert ["filter_keep", "1", "0.5", "0.5", "0.75", "0.9"] in lines


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_one_step_of_default_trains_every_network(name: str):
    config = recipe("default", epochs=2, model=name, param_budget=0)
    spec = network(config.model)
    pixels = 32 if isinstance(spec, VGGSpec) else 16
    torch.manual_seed(0)
    model = build_model(spec)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, config.optim)
    schedule = Schedule(optimizer, config.optim, 2, 4, None)
    schedule.step(0)
    loss = F.cross_entropy(model(torch.randn(4, 3, pixels, pixels)), torch.arange(4))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    for old, (key, new) in zip(before, model.named_parameters(), strict=True):
        assert new.isfinite().all(), key
        if new.requires_grad and new.grad is not None and new.grad.any():
            assert not torch.equal(old, new), key


SMALL_NETWORK = ["--model", "resnet", "--blocks", "1,1", "--channels", "8,16", "--stem", "8"]


def small(image_tree: Path, out: Path, *options: str) -> list[str]:
    """``default`` with a small network on a small folder."""
    machine = ["--device", "cpu", "--threads", "1", "--precision", "fp32", "--save-seconds", "0"]
    data = ["--data", f"folder:{image_tree}", "--image-size", "16", "--out", str(out)]
    return [*SMALL_NETWORK, *machine, *data, *options]


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--ema 0.8",
        "--lookahead 5",
        "--norm none --epochs 60",
        "--optimizer sgd",
        "--epochs 2.5",
    ],
)
def test_default_learns_a_folder_of_48_images(options: str, image_tree: Path, tmp_path: Path):
    # No flips: the images of a class are the other's, mirrored.
    line = small(image_tree, tmp_path, "--augment", "crop=1", *options.split())
    result = train(command_line(line)[1])
    saved = files.load(result.path / "config.json")
    assert saved.undecided == ()
    assert (saved.optim.batch_size, saved.data.filter_keep) == (48, 1.0)
    least = 0.6 if "2.5" in options else 0.9
    assert result.summary.test_accuracy >= least, result.summary.test_accuracy


def test_seeds_that_are_resumed_with_more_epochs_all_have_the_first_values(
    image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    line = small(image_tree, tmp_path, "--runs", "2", "--name", "both")
    config = command_line(line)[1]
    assert "augment" in config.undecided  # the number of epochs is not known yet
    interrupt_at(monkeypatch, 20)  # in the second of two runs of 14 steps
    with pytest.raises(Interrupted):
        resfast.train(config)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "both" / "seed1")
    resumed = ["--resume", str(tmp_path / "both"), "--epochs", "20"]
    resfast.train(command_line(resumed)[1], resume=tmp_path / "both")
    first, second = (files.load(tmp_path / f"both/seed{n}/config.json") for n in (0, 1))
    assert first.optim.epochs == 20
    assert str(first.data.augment) == "crop=1,flip=alternating"  # of 14 epochs; 20 have cutout
    assert "cutout" in str(recipe("default", epochs=20, image_size=16).data.augment)
    assert second == change(first, seed=1, name="seed1")
