"""Starting from trained weights, of other projects too, and training only some of the layers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import resfast
from resfast.cli.train import command_line, main
from resfast.config.schema import Config
from resfast.errors import ResfastError
from resfast.layers.norm import train_mode
from resfast.models.presets import build_model
from resfast.models.resnet import ResNet, ResNetSpec
from resfast.models.speednet import SpeedNetSpec
from resfast.models.vgg import VGG, VGGSpec
from resfast.runs import folder as records
from resfast.runs.transfer import Source, common_names, freeze, initialize, read_source
from resfast.training.loop import Interrupted, train
from tests.conftest import change, interrupt_at
from tests.test_training import assert_same_weights, weights

CLASSES = tuple("abcdefghij")
SPEC = ResNetSpec((2, 1), (8, 16), stem=8)


class CifarBlock(nn.Module):
    """A basic block with the names of kuangliu/pytorch-cifar."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride > 1 or inner != outer:
            shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class CifarNet(nn.Module):
    """The network of ``SPEC`` with the names of kuangliu/pytorch-cifar."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(CifarBlock(8, 8, 1), CifarBlock(8, 8, 1))
        self.layer2 = nn.Sequential(CifarBlock(8, 16, 2))
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(x.mean((2, 3)))


def with_statistics(model: nn.Module, pixels: int = 16) -> nn.Module:
    """The model in eval mode, with parameters and running statistics that are not the initial."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.train()(torch.randn(8, 3, pixels, pixels))
    return model.eval()


def same_logits(model: nn.Module, other: nn.Module, pixels: int = 16) -> None:
    images = torch.randn(4, 3, pixels, pixels)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), other(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrapped", ["plain", "module", "_orig_mod.module", "backbone"])
@pytest.mark.parametrize("container", ["net", "state_dict", None])
def test_a_checkpoint_of_pytorch_cifar_is_taken_whole(
    wrapped: str, container: str | None, tmp_path: Path
):
    other = with_statistics(CifarNet())
    prefix = "" if wrapped == "plain" else f"{wrapped}."
    state = {f"{prefix}{name}": value for name, value in other.state_dict().items()}
    torch.save({container: state, "acc": 93.5, "epoch": 12} if container else state, tmp_path / "c")
    model = ResNet(SPEC)
    found = initialize(model, read_source(tmp_path / "c"), CLASSES)
    assert all(row.reason is None for row in found.rows)
    assert found.left == ()
    same_logits(model, other)


def test_a_network_of_torchvision_is_taken_whole():
    torchvision = pytest.importorskip("torchvision")
    other = with_statistics(torchvision.models.resnet18(num_classes=10), 64)
    spec = ResNetSpec((2, 2, 2, 2), (64, 128, 256, 512), stem_kind="imagenet")
    model = ResNet(spec)
    found = initialize(model, Source(Path("x"), other.state_dict()), CLASSES)
    assert all(row.reason is None for row in found.rows)
    same_logits(model, other, 64)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_plain_network_of_torchvision_is_taken_by_the_order_of_its_layers(norm: str):
    vgg = pytest.importorskip("torchvision.models.vgg")
    features = vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=norm == "batch")
    other = vgg.VGG(features, num_classes=10, dropout=0.5)
    model = VGG(VGGSpec((8, 16), (1, 2), norm, head=(4096, 4096)), image_size=28)
    other.avgpool = nn.Identity()
    other.classifier[0] = nn.Linear(16 * 7 * 7, 4096)
    other = with_statistics(other, 28)
    found = initialize(model, Source(Path("x"), other.state_dict()), CLASSES)
    assert all(row.reason is None for row in found.rows)
    same_logits(model, other, 28)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        ResNetSpec((1, 1), (8, 16), stem=8, block="bottleneck", shortcut="conv3", head=(12, 7)),
        ResNetSpec((1, 1), (8, 16), stem=8, norm="none", stem_kind="imagenet", dropout=0.1),
        SpeedNetSpec((16, 16), (3, 2), residual=True, whitening_width=4),
        VGGSpec((8, 16), (2, 1), "batch", head=(12,), dropout=0.2),
    ],
)
def test_every_layer_of_ours_has_a_name_of_its_own(spec: object):
    first, second = build_model(spec), build_model(spec)
    state = first.state_dict()
    assert len(common_names(state)) == len(state)
    mixed = {name: state[name] for name in sorted(state, key=lambda name: name[::-1])}
    found = initialize(second, Source(Path("x"), mixed), CLASSES)
    assert [row.source for row in found.rows] == [row.name for row in found.rows]
    for name, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[name])


def test_what_does_not_agree_stays_and_is_listed():
    other, model = CifarNet(), ResNet(ResNetSpec((2, 1, 1), (8, 16, 12), stem=8), classes=7)
    state = {**other.state_dict(), "extra.weight": torch.zeros(2)}
    state["layer1.1.conv2.weight"] = torch.zeros(8, 8, 5, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = initialize(model, Source(Path("some.pth"), state), CLASSES[:7])
    reasons = {row.name: row.reason for row in found.rows if row.reason}
    assert reasons["stages.0.1.conv2.weight"] == "layer1.1.conv2.weight is [8, 8, 5, 5]"
    assert reasons["stages.2.0.conv1.weight"] == "the file has none"
    assert reasons["head.1.weight"] == "linear.weight is [10, 16]"
    for name, value in model.state_dict().items():
        kept = torch.equal(value, before[name])
        assert kept == (name in reasons) or torch.equal(value, before[name]), name
    assert torch.equal(model.stages[1][0].conv1.weight, other.layer2[0].conv1.weight)
    assert found.left == ("extra.weight",)
    table = found.table()
    assert re.search(r"^  stem +6/6 +249$", table, re.M), table
    assert re.search(r"^  head +0/2 +0$", table, re.M)
    assert "not taken: stages.0.1.conv2.weight [8, 8, 3, 3]: layer1.1.conv2.weight is" in table
    assert "left in the file: extra.weight" in table


def test_the_last_layer_of_other_classes_is_not_taken():
    other, model = ResNet(SPEC), ResNet(SPEC)
    head = model.head[1].weight.clone()
    found = initialize(model, Source(Path("x"), other.state_dict(), CLASSES[::-1]), CLASSES)
    assert torch.equal(model.head[1].weight, head)
    assert [row.reason for row in found.rows[-2:]] == ["the file's is of other classes"] * 2
    initialize(model, Source(Path("x"), other.state_dict(), CLASSES), CLASSES)
    assert torch.equal(model.head[1].weight, other.head[1].weight)


def test_files_that_cannot_be_taken_are_refused(tmp_path: Path):
    class Custom:
        pass

    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"net": Custom.__name__, "epoch": 3}, tmp_path / "none.pth")
    torch.save({"net": nn.Linear(2, 2)}, tmp_path / "code.pth")
    torch.save({"net": {"fc.weight": torch.tensor([[float("nan")]])}}, tmp_path / "nan.pth")
    for name, message in {
        "missing": "missing does not exist; expected the folder of a run or a file of weights",
        "empty": "has no model.safetensors, best.safetensors, checkpoint.pt",
        "text.pth": "text.pth cannot be read",
        "text.safetensors": "is not a safetensors file",
        "none.pth": "has no state dict, but net, epoch",
        "code.pth": "without other Python objects",
        "nan.pth": "fc.weight has values that are not finite",
    }.items():
        with pytest.raises(ResfastError, match=re.escape(message)):
            read_source(tmp_path / name)
    with pytest.raises(ResfastError, match="no layer agrees in name and shape"):
        initialize(ResNet(SPEC), Source(Path("x"), VGG(VGGSpec((4,), (1,))).state_dict()), CLASSES)


# -- freezing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["stem"], {"stem"}),
        (["stages.0", "head"], {"stages.0", "head"}),
        (["stages.[01].*"], {"stages.0", "stages.1"}),
        (["*.bn1"], {"stages.0.0.bn1", "stages.0.1.bn1", "stages.1.0.bn1"}),
        (["stages.1.0.conv1.weight"], {"stages.1.0.conv1"}),
    ],
)
def test_patterns_freeze_layers_and_their_statistics(patterns: list[str], frozen: set[str]):
    model = ResNet(SPEC)
    count = freeze(model, patterns)
    expected = {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(name.startswith(f"{layer}.") for layer in frozen)
    }
    assert count == sum(parameter.numel() for parameter in expected.values())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name not in expected)
    train_mode(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == (f"{name}.weight" not in expected)
        else:
            assert module.training


def test_a_pattern_without_a_layer_is_refused():
    with pytest.raises(ResfastError, match=re.escape("--freeze stages.7 matches no layer")):
        freeze(ResNet(SPEC), ["stem", "stages.7"])


def test_norms_with_frozen_scales_alone_still_use_the_batch():
    model = ResNet(ResNetSpec((1,), (8,), stem=8, freeze_norm_scale=True))
    train_mode(model)
    assert all(module.training for module in model.modules())


# -- runs ---------------------------------------------------------------------------------------


def test_a_run_starts_from_a_run_and_leaves_frozen_layers(
    tiny: Config, capsys: pytest.CaptureFixture[str]
):
    first = train(change(tiny, name="first"))
    before = weights(first.path)
    config = change(tiny, name="second", init_from=first.path, freeze=("stem", "stages.0"), seed=1)
    second = train(config)
    output = capsys.readouterr().out
    assert f"initial weights from {first.path / records.WEIGHTS}" in output
    assert "parameters frozen" in output
    after = weights(second.path)
    for name, value in after.items():
        same = torch.equal(value, before[name])
        assert same == name.startswith(("stem", "stages.0")), name
    optimized = sum(len(group["params"]) for group in state_of(second.path)["param_groups"])
    names = dict(second.model.named_parameters())
    assert optimized == sum(not name.startswith(("stem", "stages.0")) for name in names)


def state_of(path: Path) -> dict:
    return torch.load(path / records.CHECKPOINT, weights_only=True)["training"]["optimizer"]


@pytest.mark.parametrize("kind", ["folder", "weights", "checkpoint", "state dict"])
def test_every_file_of_a_run_starts_another_alike(tiny: Config, tmp_path: Path, kind: str):
    first = train(change(tiny, name="first", epochs=1))
    source = first.path
    if kind == "weights":
        source = tmp_path / "copy.safetensors"
        shutil.copy(first.path / records.WEIGHTS, source)
    elif kind == "checkpoint":
        source = first.path / records.CHECKPOINT
    elif kind == "state dict":
        source = tmp_path / "state.safetensors"
        save_file({f"module.{k}": v for k, v in weights(first.path).items()}, source)
    found = read_source(source)
    model = resfast.load(first.path, device="cpu").model
    state = ResNet(ResNetSpec((1, 1), (8, 16), stem=8), 2)
    initialize(state, found, ("left", "right"))
    for name, value in state.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_run_from_weights_resumes_without_them(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    first = train(change(tiny, name="first", epochs=1))
    config = change(tiny, init_from=first.path, freeze=("stem",), augment=tiny.data.augment)
    whole = train(change(config, name="whole"))
    interrupt_at(monkeypatch, 5)
    with pytest.raises(Interrupted) as stopped:
        train(config)
    monkeypatch.undo()
    shutil.rmtree(first.path)
    assert_same_weights(train(resume=stopped.value.path).path, whole.path)


def test_every_seed_starts_from_the_weights(tiny: Config):
    first = train(change(tiny, name="first", epochs=1))
    config = change(tiny, init_from=first.path, lr=1e-9, epochs=1, ema=0.0, name="seeds", runs=2)
    both = resfast.train(config)
    for seed in (0, 1):
        head = weights(both.path / f"seed{seed}")["head.1.weight"]
        torch.testing.assert_close(head, weights(first.path)["head.1.weight"])


def test_filters_of_a_whitening_layer_are_taken_too(tiny: Config):
    speednet = change(
        tiny, model="speednet", blocks=(), convolutions=(2, 1), channels=(16, 16), stem=None,
        whitening_width=4, epochs=1, name="first",
    )  # fmt: skip
    first = train(speednet)
    path = first.path / records.WEIGHTS
    taken = change(speednet, init_from=path, label_noise=0.5, name="second", hold_out=4)
    assert torch.equal(
        weights(train(taken).path)["whitening.weight"], weights(first.path)["whitening.weight"]
    )


def test_all_layers_frozen_leaves_nothing_to_train(tiny: Config):
    with pytest.raises(ResfastError, match="no trainable parameters"):
        train(change(tiny, freeze=("*",)))


def test_options_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = ["--init-from", "runs/a", "--freeze", "stem,stages.[01]"]
    config = command_line(line)[1]
    assert config.transfer.init_from == Path("runs/a")
    assert config.transfer.freeze == ("stem", "stages.[01]")
    options = ["--data", "digits", "--out", str(tmp_path), "--init-from", str(tmp_path / "no")]
    assert main([*options, "--device", "cpu"]) == 2
    assert "no does not exist" in capsys.readouterr().err
