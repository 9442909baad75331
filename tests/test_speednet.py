"""The speed networks: their formula, their start, and everything that handles networks."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resfast
from resfast.cli.train import main
from resfast.config import files
from resfast.config.network import network
from resfast.config.schema import Config, ModelConfig
from resfast.errors import ResfastError
from resfast.models.presets import PRESETS, build_model, create_model
from resfast.models.resnet import ResNetSpec, count_parameters
from resfast.models.speednet import SpeedNet, SpeedNetSpec
from resfast.models.summary import count_macs, layer_table
from resfast.ops.norm_act import op as norm_act
from resfast.training.loop import train
from tests.conftest import change
from tests.test_export import FORMATS, loaded, make_run, pixels, relative_error

SPEEDNETS = sorted(name for name, spec in PRESETS.items() if isinstance(spec, SpeedNetSpec))
BUDGET = 5_000_000
ACTIVATIONS = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
}
VARIANTS = {
    "plain": {},
    "residual": {"convolutions": (3, 4), "residual": True},
    "learned": {"whitening": False, "whitening_kernel": 3},
    "same, even kernel": {"whitening_padding": "same"},
    "same, odd kernel": {"whitening_padding": "same", "whitening_kernel": 3},
    "narrow whitening": {"whitening_width": 5},
    "no pools": {"strides": (1, 1), "convolutions": (1, 2)},
    "average": {"final_pool": "avg"},
    "maximum and average": {"final_pool": "both"},
    "silu": {"activation": "silu"},
    "relu": {"activation": "relu"},
    "leaky_relu": {"activation": "leaky_relu"},
    "trained scales": {"freeze_norm_scale": False, "dirac_init": False},
}


def spec_of(**values: object) -> SpeedNetSpec:
    return SpeedNetSpec(**{"channels": (8, 12), "convolutions": (2, 3)} | values)


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with batch norms as training leaves them."""
    random = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=random) + 0.5)
        elif tensor.ndim == 1:
            tensor.data.copy_(tensor + 0.3 * torch.randn(tensor.shape, generator=random))
    return model.eval()


def formula(model: SpeedNet, x: Tensor) -> Tensor:
    """The network from its description, in functions and by the names of its state dict."""
    spec, state = model.spec, model.state_dict()
    activation = ACTIVATIONS[spec.activation]

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, scale, shift = (
            state[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + spec.norm_eps).sqrt() * scale + shift

    kernel = spec.whitening_kernel
    if spec.whitening_padding == "same":
        x = F.pad(x, [(kernel - 1) // 2, kernel // 2] * 2)
    if spec.whitening:
        x = activation(F.conv2d(x, state["whitening.weight"], state["whitening.bias"]))
    else:
        x = activation(norm(F.conv2d(x, state["stem.conv.weight"]), "stem.bn"))
    shortcut = x
    for stage, (count, stride) in enumerate(zip(spec.convolutions, spec.strides, strict=True)):
        for index in range(count):
            x = F.conv2d(x, state[f"stages.{stage}.convs.{index}.weight"], padding=1)
            if index == 0 and stride == 2:
                x = F.max_pool2d(x, 2)
            x = norm(x, f"stages.{stage}.norms.{index}")
            if spec.residual and count >= 3 and index == count - 1:
                x = x + shortcut
            x = activation(x)
            if index == 0:
                shortcut = x
    pooled = {"max": x.flatten(2).amax(2), "avg": x.flatten(2).mean(2)}
    x = torch.cat([pooled[k] for k in ("max", "avg") if spec.final_pool in (k, "both")], 1)
    return x @ state["head.weight"].T * spec.logit_scale


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_computes_its_formula(variant: str):
    torch.manual_seed(0)
    model = with_statistics(SpeedNet(spec_of(**VARIANTS[variant]), classes=5))
    x = torch.randn(2, 3, 13, 18)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), formula(model, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_that_is_not_frozen_is_trained(variant: str):
    model = SpeedNet(spec_of(**VARIANTS[variant]), classes=3)
    model(torch.randn(6, 3, 12, 12)).square().sum().backward()
    frozen = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen.add(name)
        else:
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name
    spec = model.spec
    expected = {"whitening.weight"} if spec.whitening else set()
    if spec.freeze_norm_scale:
        expected |= {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.BatchNorm2d)
        }
    assert frozen == expected


@pytest.mark.parametrize("name", SPEEDNETS)
@pytest.mark.parametrize("size", [24, 28, 32])
def test_presets_take_the_sizes_of_a_curriculum(name: str, size: int):
    model = create_model(name, classes=7).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, size, size)).shape == (1, 7)


@pytest.mark.parametrize("name", SPEEDNETS)
def test_no_preset_is_above_the_budget_and_the_count_is_that_of_a_hand(name: str):
    spec = PRESETS[name]
    first = 3 * spec.whitening_kernel**2
    width = spec.stem
    count = width * first + width
    for channels, convolutions in zip(spec.channels, spec.convolutions, strict=True):
        for _ in range(convolutions):
            count += width * channels * 9 + 2 * channels
            width = channels
    count += 10 * width * (2 if spec.final_pool == "both" else 1)
    assert count_parameters(create_model(name)) == count <= BUDGET


def test_macs_match_a_count_by_hand():
    model = SpeedNet(spec_of(strides=(2, 1), residual=True))
    maps = [(3, 24, 2, 11), (24, 8, 3, 11), (8, 8, 3, 5), (8, 12, 3, 5), *[(12, 12, 3, 5)] * 2]
    expected = sum(cin * cout * k * k * size**2 for cin, cout, k, size in maps)
    expected += 24 * 11 * 11 + 12 * 10  # torchinfo counts a bias once a position
    norms = 2 * (2 * 8 + 3 * 12)  # and a norm's parameters once
    assert count_macs(model, 12) == expected + norms


def test_the_least_image_size_is_the_least():
    for variant in VARIANTS.values():
        spec = spec_of(**variant)
        least = spec.least_image_size
        model = build_model(spec, image_size=least).eval()
        assert model(torch.randn(1, 3, least, least)).shape == (1, 10)
        if least > 1:
            with pytest.raises(RuntimeError, match=r"small|greater than actual"):
                model(torch.randn(1, 3, least - 1, least - 1))
            with pytest.raises(ResfastError, match=f"images of {least - 1}x{least - 1}.*{least};"):
                build_model(spec, image_size=least - 1)


def test_convolutions_start_as_the_identity_and_the_scales_stay_one():
    torch.manual_seed(0)
    model = SpeedNet(spec_of(channels=(32, 12)))
    torch.manual_seed(0)
    plain = SpeedNet(spec_of(channels=(32, 12), dirac_init=False, freeze_norm_scale=False))
    x = torch.randn(2, 24, 5, 5)
    first, second = model.stages[0].convs
    torch.testing.assert_close(first(x)[:, :24], x)
    wide = torch.randn(2, 32, 5, 5)
    torch.testing.assert_close(second(wide), wide)
    torch.testing.assert_close(model.stages[1].convs[0](wide), wide[:, :12])
    torch.testing.assert_close(first.weight[24:], plain.stages[0].convs[0].weight[24:])
    assert not torch.equal(first.weight[:24], plain.stages[0].convs[0].weight[:24])
    assert not model.stages[0].norms[0].weight.requires_grad
    assert plain.stages[0].norms[0].weight.requires_grad


def test_norm_constants_and_head_follow_the_spec():
    model = SpeedNet(spec_of(norm_momentum=0.25, norm_eps=1e-3, head_std=0.5, whitening=False))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.momentum, module.eps) == (0.25, 1e-3)
    torch.testing.assert_close(model.head.weight.std(), torch.tensor(0.5))
    torch.manual_seed(0)
    one, three = (
        SpeedNet(spec_of(logit_scale=1.0)).eval(),
        SpeedNet(spec_of(logit_scale=3.0)).eval(),
    )
    three.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(three(x), 3 * one(x))


def test_channels_last_is_kept_through_the_network():
    model = create_model("speednet-94").to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    out = model.stages(model.activation(model.whitening(x)))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_autocast_stays_close_to_float32():
    torch.manual_seed(0)
    model = create_model("speednet-96").to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 24, 24).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8)
    results, gradients = [], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(x.bfloat16() if enabled else x)
        F.cross_entropy(logits.float(), labels).backward()
        results.append(logits.float())
        gradients.append([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (results[0] - results[1]).norm() < 0.03 * results[0].norm()
    for exact, rough in zip(*gradients, strict=True):  # some maxima lie elsewhere after rounding
        assert F.cosine_similarity(exact, rough, 0) > 0.95


@pytest.mark.parametrize(
    ("final_pool", "kernels"), [("max", False), ("max", True), ("avg", True), ("both", True)]
)
def test_compiled_gradients_are_those_of_eager(
    final_pool: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
):
    """Without our kernels the compiler fuses norm, activation and final pool."""
    if not kernels:
        monkeypatch.setattr(norm_act, "AVAILABLE", False)
    if resfast.runtime.compiler_missing(torch.device("cpu")):
        pytest.skip("no compiler")
    torch.manual_seed(0)
    model = SpeedNet(SpeedNetSpec((32,), (2,), final_pool=final_pool))
    model.to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 12, 12).bfloat16().contiguous(memory_format=torch.channels_last)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x).float(), torch.arange(8))

    twin = copy.deepcopy(model)
    loss(model, x).backward()
    torch.compile(loss)(twin, x).backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if one.requires_grad:
            assert (one.grad - other.grad).norm() < 0.1 * one.grad.norm(), name


@pytest.mark.gpu
def test_a_cuda_network_computes_what_the_cpu_does():
    torch.manual_seed(0)
    model = with_statistics(SpeedNet(spec_of()))
    x = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": (4,)}, "same number of stages"),
        ({"channels": (), "convolutions": ()}, "at least one"),
        ({"convolutions": (0, 1)}, "convolutions 0,1 must"),
        ({"strides": (2, 3)}, "strides 2,3 must all be 2"),
        ({"strides": (2,)}, "same number"),
        ({"whitening_kernel": 0}, "whitening_kernel 0 must be at least 1"),
        ({"whitening_width": 13}, "whitening_width 13 must be 1 to 12"),
        ({"whitening_width": -1}, "whitening_width -1"),
        ({"activation": "swish"}, "activation 'swish' is unknown"),
        ({"final_pool": "min"}, "final_pool 'min' is unknown"),
        ({"whitening_padding": "full"}, "whitening_padding 'full' is unknown"),
        ({"logit_scale": 0.0}, "logit_scale 0.0 must be a positive"),
        ({"head_std": -1.0}, "head_std -1.0"),
        ({"norm_momentum": 0.0}, "norm_momentum 0.0 must be above 0"),
        ({"norm_eps": 0.0}, "norm_eps 0.0"),
    ],
)
def test_a_bad_shape_is_refused(values: dict, message: str):
    with pytest.raises(ResfastError, match=message):
        spec_of(**values)


def test_fewer_than_two_classes_are_refused():
    with pytest.raises(ResfastError, match="classes 1"):
        create_model("speednet-94", classes=1)


# -- configuration and command line ------------------------------------------------------------


def test_every_field_of_a_spec_is_an_option():
    values = {
        "channels": (4, 5, 6),
        "convolutions": (1, 2, 3),
        "strides": (1, 2, 2),
        "residual": True,
        "whitening": False,
        "whitening_kernel": 3,
        "whitening_padding": "same",
        "whitening_width": 7,
        "activation": "silu",
        "final_pool": "avg",
        "logit_scale": 0.5,
        "head_std": 1.0,
        "norm_momentum": 0.2,
        "norm_eps": 1e-4,
        "freeze_norm_scale": False,
        "dirac_init": False,
    }
    assert network(ModelConfig(model="speednet", **values)) == SpeedNetSpec(**values)
    assert values.keys() == asdict(SpeedNetSpec((1,), (1,))).keys()
    for name, value in values.items():
        if name not in ("channels", "convolutions", "strides"):
            made = network(ModelConfig(model="speednet-94", **{name: value}))
            assert made == replace(PRESETS["speednet-94"], **{name: value})


def test_overrides_apply_to_a_preset():
    made = network(ModelConfig(model="speednet-94", convolutions=(2, 2), channels=(32, 64)))
    assert made == replace(
        PRESETS["speednet-94"], convolutions=(2, 2), channels=(32, 64), strides=(2, 2)
    )
    assert network(ModelConfig(model="resnet-222", dirac_init=True, freeze_norm_scale=True)) == (
        replace(PRESETS["resnet-222"], dirac_init=True, freeze_norm_scale=True)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "speednet"}, "needs --convolutions and --channels"),
        ({"model": "speednet-94", "blocks": (1,)}, "--blocks is an option of resnets"),
        ({"model": "speednet-94", "stem": 8}, "--stem is an option of resnets"),
        ({"model": "speednet-94", "zero_init_residual": True}, "--zero-init-residual is an option"),
        ({"model": "resnet-222", "whitening": True}, "--whitening is an option of speednets"),
        ({"model": "resnet-222", "whitening": False}, "--whitening is an option of speednets"),
        ({"model": "resnet-222", "convolutions": (1,)}, "--convolutions is an option of speednets"),
        (
            {"model": "resnet-222", "zero_init_residual": True, "freeze_norm_scale": True},
            "choose one",
        ),
        ({"model": "speednet-95"}, "did you mean 'speednet-9"),
    ],
)
def test_options_that_do_not_fit_are_refused(values: dict, message: str):
    with pytest.raises(ResfastError, match=message):
        network(ModelConfig(**values))


def test_a_configuration_of_before_has_the_networks_of_before():
    old = '{"model": {"model": "resnet-2111", "blocks": [], "dropout": 0.1, "activation": null}}'
    made = network(files.from_json(old, "x").model)
    assert made == replace(PRESETS["resnet-2111"], dropout=0.1)
    assert isinstance(made, ResNetSpec)
    assert not made.dirac_init
    assert not made.freeze_norm_scale


def test_a_configuration_survives_json():
    values = ModelConfig(model="speednet-94", whitening=False, head_std=1.0, convolutions=(1, 2, 3))
    config = Config(model=values)
    assert files.from_json(files.to_json(config), "x") == config


def test_list_and_summary_show_speednets(capsys: pytest.CaptureFixture[str]):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert "2,487,504  convolutions 3,3,3  channels 64,192,256  stem 16" in out
    assert "speednet             custom: --convolutions" in out
    assert main(["--summary", "--recipe", "report-onecycle", "--model", "speednet-94"]) == 0
    out = capsys.readouterr().out
    assert "2,487,504" in out
    assert "[1, 16, 31, 31]" in out
    assert layer_table(create_model("speednet-94")) in out


def test_an_image_too_small_for_the_pools_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    options = "--data digits --model speednet-94 --image-size 7 --out".split()
    assert main([*options, str(tmp_path)]) == 2
    assert "images of 7x7 pixels are too small" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_network_above_the_budget_is_refused(tiny: Config):
    model = ModelConfig(model="speednet-94", param_budget=2_483_407)
    with pytest.raises(ResfastError, match="2,483,408 parameters, above the budget of 2,483,407"):
        train(replace(tiny, model=model))


# -- whole runs --------------------------------------------------------------------------------

TINY = ModelConfig(model="speednet", convolutions=(1, 3), channels=(8, 16), residual=True)


@pytest.fixture
def tiny_speednet(tiny: Config) -> Config:
    return change(replace(tiny, model=TINY), whitening_bias_epochs=1.0, lr=0.2, epochs=4)


def test_a_run_learns_and_is_loaded_evaluated_predicted_and_exported(
    tiny_speednet: Config, image_tree: Path
):
    result = train(tiny_speednet)
    assert result.summary.test_accuracy == 1.0
    assert result.summary.params == count_parameters(SpeedNet(network(TINY), 2))
    assert result.summary.macs == count_macs(SpeedNet(network(TINY), 2), 16)
    run = resfast.load(result.path, device="cpu")
    assert isinstance(run.model, SpeedNet)
    state = result.model.state_dict()
    assert state.keys() == run.model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in run.model.state_dict().items())
    assert resfast.evaluate(result.path).accuracy == 1.0
    (answer,) = resfast.predict(result.path, image_tree / "test" / "right" / "000.png")
    assert answer[0][0] == "right"
    made = resfast.export(result.path, report=lambda line: None)
    assert made.agreement == 1.0
    assert made.relative_error < 1e-5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("variant", ["residual", "learned", "same, even kernel", "average"])
def test_an_exported_network_gives_the_logits_of_the_run(format: str, variant: str, tmp_path: Path):
    shape = {"model": "speednet", "channels": (8, 12), "convolutions": (2, 3)}
    foreign = {"blocks": (), "stem": None}
    run = make_run(tmp_path / "run", **foreign, **(shape | VARIANTS[variant]))
    trained = resfast.load(run, device="cpu")
    assert isinstance(trained.model, SpeedNet)
    made = resfast.export(trained, format, report=lambda line: None)
    network = loaded(made)
    for count in (1, 5):
        assert relative_error(network(pixels(count)), trained.logits(pixels(count))) < 1e-5


def test_a_resumed_run_ends_with_the_same_bits(tiny_speednet: Config, monkeypatch):
    whole = train(tiny_speednet)
    from resfast.training.state import TrainingState

    saved = TrainingState.save
    stopped = change(tiny_speednet, name="stopped")

    def stop(state: TrainingState, epoch: int, step: int) -> None:
        saved(state, epoch, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    resumed = train(resume=stopped.run.out / "stopped")
    state = whole.model.state_dict()
    assert all(
        torch.equal(state[name], value) for name, value in resumed.model.state_dict().items()
    )
    assert resumed.summary.whitening_seconds > 0


def test_the_bias_of_the_whitening_is_trained_where_asked(tiny_speednet: Config):
    trained = train(change(tiny_speednet, epochs=1)).model
    frozen = train(change(tiny_speednet, epochs=1, name="frozen", whitening_bias_epochs=0.0)).model
    assert trained.whitening.bias.any()
    assert not frozen.whitening.bias.any()
    torch.testing.assert_close(trained.whitening.weight, frozen.whitening.weight)
