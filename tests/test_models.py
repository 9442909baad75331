from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resfast
from resfast.errors import ResfastError
from resfast.layers.activation import ACTIVATIONS
from resfast.layers.shortcut import PoolPadShortcut
from resfast.models.presets import PRESETS, create_model, preset
from resfast.models.resnet import ResNet, ResNetSpec, count_parameters
from resfast.models.summary import count_macs, layer_table
from resfast.models.vgg import VGG, VGGSpec

PARAMETERS = {
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "resnet101": 42_512_970,
    "resnet152": 58_156_618,
    "resnet-2111": 4_977_226,
    "resnet-1111": 4_903_242,
    "resnet-6543-half": 4_865_322,
    "resnet-2222-half": 2_797_610,
    "resnet-2222-half-identity": 2_753_706,
    "resnet-222": 2_777_674,
    "resnet-222-identity": 2_735_946,
    "resnet-narrow": 2_768_490,
    "resnet-narrow-skip3": 3_112_554,
    "resnet-narrow-dense": 3_151_786,
    "resnet-deep8": 4_997_386,
    "resnet-224": 5_139_018,
    "resnet-224-250": 4_939_902,
    "resnet-224-251": 4_993_025,
    "resnet-453": 4_992_586,
    "resnet-member1m": 987_402,
    "speednet-94": 2_487_504,
    "speednet-96": 3_358_992,
    "cnn": 522_046,
    "vgg-a": 9_750_922,
    "vgg-a-bn": 9_756_426,
    "vgg-a-light": 285_162,
}


def test_every_preset_has_its_published_parameter_count():
    assert set(PRESETS) == set(PARAMETERS)
    with torch.device("meta"):
        counts = {name: count_parameters(create_model(name)) for name in PRESETS}
    assert counts == PARAMETERS


def test_five_members_make_the_ensemble_of_the_report():
    assert 5 * PARAMETERS["resnet-member1m"] == 4_937_010


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_map_images_to_logits(name: str):
    model = create_model(name, classes=7).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("size", [28, 33, 64])
def test_other_image_sizes_work(size: int):
    with torch.inference_mode():
        assert create_model("resnet-222").eval()(torch.randn(1, 3, size, size)).shape == (1, 10)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("shortcut", ["conv1", "conv3", "pool"])
def test_every_variant_trains_all_its_parameters(activation: str, block: str, shortcut: str):
    spec = ResNetSpec((1, 2), (8, 12), 8, (), block, shortcut, activation, (6,), 0.1)
    model = ResNet(spec, classes=3)
    model(torch.randn(4, 3, 9, 9)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_convolutions_start_as_those_of_torch_where_asked():
    torch.manual_seed(0)
    model = ResNet(ResNetSpec((1,), (8,), 8, init="torch"))
    torch.manual_seed(0)
    expected = nn.Conv2d(3, 8, 3, padding=1, bias=False)  # the first layer that is made
    assert torch.equal(model.stem.conv.weight, expected.weight)
    he = ResNet(ResNetSpec((1,), (64,), 64)).stages[0][0].conv1.weight
    assert he.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)


@pytest.mark.parametrize("shortcut", ["conv1", "conv3"])
def test_dirac_init_passes_channels_on(shortcut: str):
    spec = ResNetSpec((1, 1), (8, 4), 8, shortcut=shortcut, dirac_init=True)
    torch.manual_seed(0)
    model = ResNet(spec)
    torch.manual_seed(0)
    plain = ResNet(dataclasses.replace(spec, dirac_init=False))
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(model.stages[0][0].conv1(x), x)
    torch.testing.assert_close(model.stages[1][0].conv1(x), x[:, :4, ::2, ::2])
    image = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(model.stem.conv(image)[:, :3], image)
    for (name, one), other in zip(model.named_modules(), plain.modules(), strict=True):
        if isinstance(one, nn.Conv2d):
            torch.testing.assert_close(
                one.weight[one.in_channels :], other.weight[one.in_channels :]
            )
            assert not torch.equal(one.weight, other.weight), name


def test_frozen_norm_scales_stay_one_and_count():
    spec = ResNetSpec((1, 1), (4, 8), 4)
    model = ResNet(dataclasses.replace(spec, freeze_norm_scale=True))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in norms)
    assert all(bool(norm.bias.any()) for norm in norms)
    scales = sum(norm.num_features for norm in norms)
    assert count_parameters(model) == count_parameters(ResNet(spec))
    assert sum(p.numel() for p in trained) == count_parameters(model) - scales


def test_strides_default_to_one_then_two():
    assert ResNetSpec((1, 1, 1), (4, 8, 8)).strides == (1, 2, 2)


def test_feature_maps_follow_the_strides():
    model = ResNet(ResNetSpec((1, 1, 1), (4, 8, 8), 4, (2, 1, 2)))
    assert model.stages(model.stem(torch.randn(1, 3, 32, 32))).shape == (1, 8, 8, 8)


def test_a_basic_block_computes_the_textbook_formula():
    torch.manual_seed(0)
    block = ResNet(ResNetSpec((1, 1), (4, 6), 4)).eval().stages[1][0]
    x = torch.randn(2, 4, 8, 8)
    with torch.inference_mode():
        out = torch.relu(block.bn1(block.conv1(x)))
        expected = torch.relu(block.bn2(block.conv2(out)) + block.shortcut(x))
        torch.testing.assert_close(block(x), expected)


def test_zero_init_residual_makes_identity_blocks():
    model = ResNet(ResNetSpec((2,), (4,), 4))
    model.zero_init_residual()
    x = torch.randn(2, 4, 8, 8).relu()
    torch.testing.assert_close(model.stages(x), x)


def test_pool_shortcut_averages_and_pads_with_zeros():
    x = torch.arange(2 * 3 * 5 * 5, dtype=torch.float32).view(2, 3, 5, 5)
    out = PoolPadShortcut(3, 5, 2)(x)
    assert out.shape == (2, 5, 3, 3)
    torch.testing.assert_close(out[0, 0, 0, 0], x[0, 0, :2, :2].mean())
    torch.testing.assert_close(out[0, 0, 2, 2], x[0, 0, 4, 4])
    assert not out[:, 3:].any()


def test_channels_last_is_kept_through_the_network():
    model = create_model("resnet-222").to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    out = model.stages(model.stem(x))
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocks": (1, 1), "channels": (4,)}, "same number of stages"),
        ({"blocks": (), "channels": ()}, "at least one"),
        ({"blocks": (0,), "channels": (4,)}, "blocks 0 must"),
        ({"blocks": (1,), "channels": (4,), "strides": (1, 2)}, "same number"),
        ({"blocks": (1,), "channels": (4,), "stem": 0}, "stem 0"),
        ({"blocks": (1,), "channels": (4,), "dropout": 1.0}, "dropout 1.0"),
        ({"blocks": (1,), "channels": (4,), "activation": "swish"}, "'swish' is unknown"),
        ({"blocks": (1,), "channels": (4,), "head": (0,)}, "head 0"),
    ],
)
def test_a_bad_shape_is_refused(values: dict, message: str):
    with pytest.raises(ResfastError, match=message):
        ResNetSpec(**values)


def test_a_narrowing_parameter_free_shortcut_is_refused():
    with pytest.raises(ResfastError, match="cannot narrow 64 channels to 16"):
        ResNet(ResNetSpec((1,), (16,), 64, shortcut="pool"))


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_a_vgg_computes_the_textbook_formula(activation: str, norm: str):
    spec = VGGSpec((8, 12), (1, 2), norm, activation, 0.3, head=(6,), dropout=0.5)
    model = VGG(spec, classes=3, image_size=9).eval()
    x = torch.randn(4, 3, 9, 9)
    act = ACTIVATIONS[activation](0.3)
    out = x
    for layer in model.features:
        if isinstance(layer, nn.MaxPool2d):
            out = F.max_pool2d(out, 2)
            continue
        out = F.conv2d(out, layer.conv.weight, layer.conv.bias, padding=1)
        out = act(layer.bn(out) if norm == "batch" else out)
    _, _, hidden, _, _, last = model.head
    assert out.shape == (4, 12, 2, 2)
    expected = last(act(hidden(out.flatten(1))))
    torch.testing.assert_close(model(x), expected)
    model.train()(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_a_vgg_says_which_images_are_too_small():
    with pytest.raises(ResfastError, match=r"images of 31x31 pixels .* 5 max pools; use .* 32"):
        VGG(PRESETS["vgg-a"], image_size=31)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"convolutions": (1,)}, "same number of stages"),
        ({"channels": (8, 0)}, "must all be at least 1"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"activation": "swish"}, "activation 'swish' is unknown"),
        ({"negative_slope": float("nan")}, "negative_slope nan"),
    ],
)
def test_a_bad_vgg_is_refused(values: dict, message: str):
    with pytest.raises(ResfastError, match=message):
        VGGSpec(**{"channels": (8, 8), "convolutions": (1, 1), **values})


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_a_resnet_without_norms_has_biases_instead(block: str):
    spec = ResNetSpec((1, 2), (8, 12), 8, (), block, norm="none")
    model = ResNet(spec, classes=3)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))
    x = torch.randn(4, 3, 9, 9)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    model.zero_init_residual()
    first = model.stages[1][1]
    out = torch.relu(torch.randn(2, 12 * spec.expansion, 4, 4))
    torch.testing.assert_close(first(out), out)


def test_the_stem_of_imagenet_quarters_the_image():
    model = ResNet(ResNetSpec((1,), (8,), 8, stem_kind="imagenet")).eval()
    assert model.stem(torch.randn(1, 3, 64, 64)).shape == (1, 8, 16, 16)
    conv = model.stem[0].conv
    assert (conv.kernel_size, conv.stride, conv.padding) == ((7, 7), (2, 2), (3, 3))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["vgg-a-light", "vgg-a-bn"])
def test_a_vgg_is_fused(name: str):
    torch.manual_seed(0)
    model = create_model(name).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        fused = resfast.fuse(model, torch.float32)
        torch.testing.assert_close(fused(x), model(x), atol=1e-5, rtol=1e-4)
    convolutions = sum(PRESETS[name].convolutions)
    assert (fused.report.convolutions, fused.report.activations) == (convolutions, convolutions)
    assert not fused.report.left


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ResfastError, match="did you mean 'resnet-2111'"):
        preset("resnet2111")


def test_macs_match_a_count_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten())
    assert count_macs(model, 8) == 3 * 4 * 9 * 8 * 8


def test_summary_names_layers_shapes_parameters_and_macs():
    model = create_model()
    table = layer_table(model)
    for text in ("Conv2d (conv1)", "[1, 512, 4, 4]", "4,977,226", "Mult-Adds"):
        assert text in table
    assert f"Total mult-adds (M): {count_macs(model) / 1e6:.2f}" in table
    assert "Units" not in table
    assert model.training
