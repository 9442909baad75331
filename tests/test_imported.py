"""Training networks of torchvision, timm and the user's own files, and using them afterwards."""

from __future__ import annotations

import json
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import resfast
from resfast.cli import evaluate, export, predict, report
from resfast.cli.train import main
from resfast.config.network import network
from resfast.config.schema import Config, ModelConfig
from resfast.config.validate import check
from resfast.errors import ResfastError
from resfast.models import imported
from resfast.models.presets import build_model
from resfast.runs.checkpoint import load_weights
from resfast.training import session
from resfast.training.loop import Interrupted, train
from tests.conftest import TINY_OPTIONS, change, interrupt_at
from tests.test_training import assert_same_weights

NETWORK = """
    import torch
    from torch import nn

    from neighbour import WIDTH

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2, bias=False)
            self.bn = nn.BatchNorm2d(WIDTH)

        def forward(self, x):
            return torch.relu(self.bn(self.conv(x)) + x)

    def make(num_classes):
        twice = Block()  # one module, two names: its weights share memory
        stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        return nn.Sequential(
            stem, twice, nn.MaxPool2d(2), twice, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(WIDTH, num_classes),
        )

    class Views(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.last = nn.Linear(4 * 16 * 16, classes)

        def forward(self, x):
            x = self.conv(x)
            return self.last(x.view(x.size(0), -1))

    class Auxiliary(nn.Sequential):
        def forward(self, x):
            out = super().forward(x)
            return (out, out) if self.training else out

    def views(num_classes): return Views(num_classes)
    def auxiliary(num_classes): return Auxiliary(make(num_classes))
    def scripted(num_classes): return torch.jit.trace(make(num_classes), torch.zeros(2, 3, 16, 16))
    def leaves(): raise SystemExit(0)
    def seven(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 7))
    def flat(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(16, num_classes))
    def fails(): raise RuntimeError("no weights found")
    def text(): return "a network"
    def lazy(num_classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
    def whitening(num_classes):
        found = make(num_classes)
        found.add_module("whitening", nn.Identity())
        return found
    def half(num_classes): return make(num_classes).half()
    def sized(classes, image_size):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, classes))
"""


@pytest.fixture(autouse=True)
def nothing_is_trusted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(imported, "_trusted", {})
    monkeypatch.setattr(imported, "_neighbours", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("resfast_network_")]:
        del sys.modules[name]
    sys.modules.pop("neighbour", None)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """A file with networks, which imports its neighbour."""
    (tmp_path / "neighbour.py").write_text("WIDTH = 8\n")
    file = tmp_path / "net.py"
    file.write_text(textwrap.dedent(NETWORK))
    return file


def built(source: str, classes: int = 2, size: int | None = 16) -> nn.Module:
    return build_model(network(ModelConfig(model=source)), classes, size)


def own(tiny: Config, source: str) -> Config:
    return change(tiny, model=source, blocks=(), channels=(), stem=None)


def options(tree: Path, folder: Path) -> list[str]:
    start = TINY_OPTIONS.index("--image-size")
    return [
        *TINY_OPTIONS[start:],
        *("--data", f"folder:{tree}", "--data-dir", str(folder / "data"), "--epochs", "1"),
        *("--out", str(folder / "runs"), "--name", "mine"),
    ]


def test_a_network_of_a_file_trains_and_is_used_where_its_file_is_named(
    net: Path, image_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["--model", f"{net}:make", *options(image_tree, tmp_path)]) == 0
    run = tmp_path / "runs" / "mine"
    assert load_weights(run / "model.safetensors").config.model.model == f"{net}:make"
    imported._trusted.clear()
    capsys.readouterr()
    assert evaluate.main([str(run)]) == 2
    assert f"if you trust that file, add --trust {net}" in capsys.readouterr().err
    trusted = ["--trust", str(net)]
    assert evaluate.main([str(run), *trusted]) == 0
    image = next((image_tree / "test" / "left").iterdir())
    assert predict.main([str(run), str(image), *trusted]) == 0
    assert report.main([str(run), "-o", str(tmp_path / "page.html"), *trusted]) == 0
    assert export.main([str(run), "--format", "torch-export", *trusted]) == 0
    fused = resfast.fuse(resfast.load(run).model)
    assert fused(torch.zeros(2, 3, 16, 16)).shape == (2, 2)


def test_a_report_leaves_out_what_needs_code_that_was_not_named(
    net: Path, image_tree: Path, tmp_path: Path
):
    assert main(["--model", f"{net}:make", *options(image_tree, tmp_path)]) == 0
    imported._trusted.clear()
    page = tmp_path / "page.html"
    assert report.main([str(tmp_path / "runs" / "mine"), "-o", str(page)]) == 0
    assert page.read_text().count("was not named in this command") == 2  # layers, mistakes


def test_code_runs_only_if_its_file_is_named(net: Path, tmp_path: Path):
    net.write_text("raise SystemExit('this code ran')\n")
    with pytest.raises(ResfastError, match=r"was not named in this command; .* --trust"):
        built(f"{net}:make")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": {"model": f"{net}:make"}}))
    assert main(["--config", str(config), "--data", "digits"]) == 2


def test_a_moved_file_is_taken_from_where_it_is_now(net: Path, tmp_path: Path):
    moved = tmp_path / "elsewhere" / "net.py"
    moved.parent.mkdir()
    (tmp_path / "neighbour.py").rename(moved.parent / "neighbour.py")
    net.rename(moved)
    with pytest.raises(ResfastError, match="there is no file"):
        built(f"{net}:make")
    resfast.trust(moved)
    assert isinstance(built(f"{net}:make"), nn.Sequential)


def test_two_moved_files_of_one_name_are_not_mixed_up(net: Path, tmp_path: Path):
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "net.py").write_text(net.read_text())
        resfast.trust(folder / "net.py")
    with pytest.raises(ResfastError, match="2 trusted files have its name"):
        built(f"{tmp_path}/elsewhere/net.py:make")


def test_neighbours_of_two_files_are_not_mixed_up(net: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "neighbour.py").write_text("WIDTH = 12\n")
    (other / "net.py").write_text(net.read_text())
    for file, width in ((net, 8), (other / "net.py", 12), (net, 8)):
        resfast.trust(file)
        assert built(f"{file}:make")[0].out_channels == width


def test_changed_code_is_noticed(
    net: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    resfast.trust(net)
    config = own(tiny, f"{net}:make")
    finished = train(change(config, name="finished")).path
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted) as stopped:
            train(config)
    resfast.load(finished)
    assert "another version" not in caplog.text
    (net.parent / "neighbour.py").write_text("WIDTH = 8  # changed\n")
    resfast.load(finished)
    assert f"was trained with another version of {net}" in caplog.text
    with pytest.raises(ResfastError, match="or of a file that it imports, has changed"):
        train(resume=stopped.value.path)


def test_a_file_needs_a_function(net: Path):
    with pytest.raises(ResfastError, match=r"add its function, .*net.py:FUNCTION"):
        built(str(net))


def test_an_interrupted_run_ends_with_the_same_bits(
    net: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
):
    resfast.trust(net)
    config = own(tiny, f"{net}:make")
    whole = train(change(config, name="whole"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted) as stopped:
            train(config)
    assert_same_weights(train(resume=stopped.value.path).path, whole.path)


def test_a_network_of_torchvision_trains_with_optimize(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def optimize(model, optimizer, dtype, *, winograd_tile):
        calls.append((type(model).__name__, type(optimizer).__name__, dtype, winograd_tile))
        return resfast.optimize(model, optimizer, dtype, winograd_tile=winograd_tile)

    monkeypatch.setattr(session, "optimize", optimize)
    config = change(own(tiny, "torchvision:shufflenet_v2_x0_5"), epochs=1)
    result = train(config)
    assert calls == [("ShuffleNetV2", "SGD", torch.float32, config.runtime.winograd_tile)]
    assert result.summary["model"] == "torchvision:shufflenet_v2_x0_5"
    assert type(resfast.load(result.path).model).__name__ == "ShuffleNetV2"


def test_a_network_of_timm_is_given_classes_and_size(monkeypatch: pytest.MonkeyPatch):
    made = []

    def create_model(name: str, *, pretrained: bool, num_classes: int, img_size: int = 0):
        if name == "fixed" and img_size:
            raise TypeError("unexpected keyword argument 'img_size'")
        made.append((name, pretrained, num_classes, img_size))
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))

    timm = types.ModuleType("timm")
    timm.create_model = create_model
    timm.is_model = lambda name: name in ("fixed", "vit")
    timm.list_models = lambda: ["fixed", "vit"]
    monkeypatch.setitem(sys.modules, "timm", timm)
    built("timm:fixed", 5)
    built("timm:vit.tag", 5)
    assert made == [("fixed", False, 5, 0), ("vit.tag", False, 5, 16)]
    with pytest.raises(ResfastError, match=r"no network of this name; did you mean 'vit'\?"):
        built("timm:vitt")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ResfastError, match=r"needs timm .*pip install timm"):
        built("timm:resnet18")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("seven", r"returns \[2, 7\] for 2 images in evaluation; expected logits \[2, 2\]"),
        ("views", r"channels_last memory.*use x.flatten\(1\)"),
        ("auxiliary", "returns tuple for 2 images in training"),
        ("scripted", "not compiled to TorchScript"),
        ("leaves", "cannot be built: SystemExit"),
        ("flat", "does not take images of 16x16 pixels"),
        ("fails", "cannot be built: RuntimeError: no weights found"),
        ("text", "made a str; expected a torch.nn.Module"),
        ("lazy", "has no shape yet"),
        ("whitening", "has a submodule 'whitening'"),
        ("half", "is torch.float16; expected torch.float32"),
        ("mak", "has no function or class 'mak'; did you mean 'make'"),
    ],
)
def test_a_bad_network_is_refused_in_a_sentence(net: Path, name: str, message: str):
    resfast.trust(net)
    with pytest.raises(ResfastError, match=message):
        built(f"{net}:{name}")


def test_a_function_is_given_what_it_asks_for(net: Path):
    resfast.trust(net)
    assert built(f"{net}:sized", 3, 8)[1].weight.shape == (3, 3 * 8 * 8)


def test_a_file_that_fails_is_named(net: Path):
    net.write_text("import no_such_package\n")
    resfast.trust(net)
    with pytest.raises(ResfastError, match=r"net.py failed: ModuleNotFoundError: No module named"):
        built(f"{net}:make")


def test_options_of_our_networks_are_refused():
    with pytest.raises(ResfastError, match="--blocks is an option of this project's networks"):
        check(Config(model=ModelConfig(model="torchvision:resnet18", blocks=(1, 1))))
    with pytest.raises(ResfastError, match="did you mean 'resnet18'"):
        built("torchvision:resnet19")
    pretraining = change(Config(), model="torchvision:resnet18", pretrain="barlow_twins")
    with pytest.raises(ResfastError, match="--pretrain needs a network of this project"):
        check(pretraining)


def test_trust_wants_a_file(tmp_path: Path):
    with pytest.raises(ResfastError, match="there is no such file"):
        resfast.trust(tmp_path / "net.py")


def test_networks_from_elsewhere_are_compared_in_a_table(
    net: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["--summary", "--model", f"{net}:make,resnet-2111", "--image-size", "16"]) == 0
    assert "4,977,226" in capsys.readouterr().out
