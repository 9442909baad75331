"""Small random networks for ``tests/test_fuse_values.py``: a list of steps, drawn by hypothesis."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

CONVOLUTION = st.fixed_dictionaries(
    {
        "kind": st.just("convolution"),
        "outputs": st.sampled_from([1, 4, 8, 17, 32]),
        "kernel": st.sampled_from([1, 2, 3, 3, 3, 5, (1, 3)]),
        "stride": st.sampled_from([1, 1, 2, 3, (1, 2)]),
        "padding": st.sampled_from([0, 1, 1, 2, (0, 1), "same"]),
        "dilation": st.sampled_from([1, 1, 1, 2]),
        "grouped": st.sampled_from(["no", "no", "depthwise", "two"]),
        "bias": st.booleans(),
        "padding_mode": st.sampled_from(["zeros", "zeros", "zeros", "reflect", "circular"]),
        "weight": st.sampled_from(
            ["plain"] * 4 + ["weight_norm", "spectral_norm", "old", "pruned", "standardised"]
        ),
        "norm": st.sampled_from(["none", "batch", "batch", "plain batch", "group", "instance"]),
        "hook": st.sampled_from([False, False, False, False, True]),
        "functional": st.sampled_from([False, False, False, True]),
    }
)
ACTIVATIONS = {
    "relu": lambda x: F.relu(x),
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu_": lambda x: x.relu_(),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "silu": lambda x: F.silu(x),
    "gelu": lambda x: F.gelu(x),
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": lambda x: F.hardswish(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "tanh": lambda x: x.tanh(),
    "relu6": lambda x: F.relu6(x),
    "clamp": lambda x: x.clamp(0, 6),
    "hardsigmoid": lambda x: F.hardsigmoid(x),
    "written-out silu": lambda x: x * torch.sigmoid(x),
    "written-out hardswish": lambda x: x * F.relu6(x + 3) / 6,
    "written-out hardsigmoid": lambda x: (x + 3).clamp(0, 6) / 6,
}
OTHERS = {
    "max pool": lambda x: F.max_pool2d(x, 2),
    "overlapping max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "global pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "gate": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "padded average pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "both": lambda x: torch.cat([x, x.flip(1)], 1),
    "view": lambda x: x.contiguous().view(x.size(0), x.size(1), -1).view(x.shape),
    "permute": lambda x: x.permute(0, 2, 3, 1).reshape(x.shape),
    "pad": lambda x: F.pad(x, (1, 0, 0, 1)),
    "scale": lambda x: x.mul_(0.5).add_(0.25),
    "mask": lambda x: x * (x > 0) + (x == x),  # continuous, so that rounding changes little
    "line": lambda x: x + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype),
    "zeros": lambda x: torch.cat([x, torch.zeros_like(x[:, :1])], 1),
    "shuffle": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "part": lambda x: x[:, : max(1, x.shape[1] - 1), 1:],
}
IN_DEFAULT_DTYPE = {
    "new line": lambda x: x + torch.linspace(-1, 1, x.shape[-1]),
    "new zeros": lambda x: torch.cat([x, torch.zeros(x.shape[0], 1, x.shape[2], x.shape[3])], 1),
    "float": lambda x: x.float() * 0.5,
}
"""Steps that make float32 tensors, and what the same are in float64."""
IN_FLOAT64 = {
    "new line": OTHERS["line"],
    "new zeros": OTHERS["zeros"],
    "float": lambda x: x * 0.5,
}


def _step(kind: str, names: Any) -> st.SearchStrategy:
    return st.fixed_dictionaries({"kind": st.just(kind), "name": st.sampled_from(sorted(names))})


STEPS = st.lists(
    st.one_of(
        CONVOLUTION,
        CONVOLUTION,
        _step("activation", ACTIVATIONS),
        _step("other", OTHERS),
        _step("default dtype", IN_DEFAULT_DTYPE),
        st.fixed_dictionaries(
            {
                "kind": st.just("residual"),
                "how": st.sampled_from(["+", "+=", "alpha", "channel", "position", "shared"]),
                "back": st.integers(1, 4),
            }
        ),
        st.fixed_dictionaries({"kind": st.just("cat"), "back": st.integers(1, 4)}),
        st.fixed_dictionaries({"kind": st.just("norm"), "scale": st.sampled_from([False, True])}),
        st.fixed_dictionaries(
            {
                "kind": st.just("gate"),
                "gate": st.sampled_from(["sigmoid", "hardsigmoid"]),
                "linear": st.booleans(),
            }
        ),
    ),
    min_size=1,
    max_size=7,
)
HEADS = st.sampled_from(
    ["none", "view", "flatten", "pooled", "keyword", "computed", "twice", "float"]
)


class Network(nn.Module):
    """Runs steps one after the other, then a head.

    Args:
        steps: of :data:`STEPS`.
        head: of :data:`HEADS`.
        size: of the images it is built for, ``[N, C, H, W]``.
        seed: of the weights.
        float64: builds the same network in float64.
    """

    def __init__(
        self,
        steps: list[dict[str, Any]],
        head: str,
        size: tuple[int, ...],
        seed: int,
        float64: bool,
    ) -> None:
        super().__init__()
        self.steps, self.head, self.float64 = steps, head, float64
        self.layers = nn.ModuleDict()
        self.random = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.classifier: nn.Module | None = None
            self.building = True
            with torch.no_grad():
                self(torch.randn(size, generator=self.random))
            self.building = False
        del self.random
        self.eval()
        if float64:
            self.double()

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for index, step in enumerate(self.steps):
            if step["kind"] == "convolution":
                x = self._convolution(str(index), step, x)
            elif step["kind"] == "activation":
                x = ACTIVATIONS[step["name"]](x)
            elif step["kind"] == "other":
                x = OTHERS[step["name"]](x)
            elif step["kind"] == "default dtype":
                exact = self.float64 and not self.building
                x = (IN_FLOAT64 if exact else IN_DEFAULT_DTYPE)[step["name"]](x)
            elif step["kind"] == "cat":
                x = self._cat(step, x, values)
            elif step["kind"] == "norm":
                x = self._norm(str(index), step, x)
            elif step["kind"] == "gate":
                x = self._gated(str(index), step, x)
            else:
                x = self._add(str(index), step, x, values)
            values.append(x)
        return self._classified(x)

    def _convolution(self, name: str, step: dict[str, Any], x: Tensor) -> Tensor:
        if self.building:
            self.layers[name] = _convolution(step, x.shape[1], self.random)
        layer = self.layers[name]
        plain = step["padding_mode"] == "zeros" and step["weight"] == "plain"
        if not step["functional"] or step["hook"] or not plain:
            return layer(x)
        conv, rest = layer[0], layer[1:]
        groups = x.shape[1] if conv.groups == x.shape[1] else conv.groups
        return rest(
            F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, groups)
        )

    def _cat(self, step: dict[str, Any], x: Tensor, values: list[Tensor]) -> Tensor:
        other = values[max(0, len(values) - 1 - step["back"])]
        if self.building:
            step["fits"] = other.shape[2:] == x.shape[2:] and x.shape[1] + other.shape[1] < 100
        return torch.cat([x, other], 1) if step["fits"] else x

    def _norm(self, name: str, step: dict[str, Any], x: Tensor) -> Tensor:
        """A batch norm, or the same written with a computed scale."""
        if self.building:
            self.layers[name] = _batch_norm(x.shape[1], True, self.random)
        norm = self.layers[name]
        if not step["scale"]:
            return norm(x)
        scale = (norm.weight * (norm.running_var + norm.eps).rsqrt()).reshape(-1, 1, 1)
        return x * scale + (norm.bias - norm.running_mean).view(1, -1, 1, 1)

    def _gated(self, name: str, step: dict[str, Any], x: Tensor) -> Tensor:
        """Squeeze-and-excitation (arXiv:1709.01507)."""
        channels = x.shape[1]
        if self.building:
            layer = nn.Linear if step["linear"] else (lambda i, o: nn.Conv2d(i, o, 1))
            self.layers[name] = nn.Sequential(layer(channels, 4), layer(4, channels))
        down, up = self.layers[name]
        gate = x.mean((2, 3)) if step["linear"] else F.adaptive_avg_pool2d(x, 1)
        gate = getattr(F, step["gate"])(up(F.relu(down(gate))))
        return x * (gate[:, :, None, None] if step["linear"] else gate)

    def _add(self, name: str, step: dict[str, Any], x: Tensor, values: list[Tensor]) -> Tensor:
        how, index = step["how"], max(0, len(values) - 1 - step["back"])
        if self.building and how in ("channel", "position"):
            shape = (1, x.shape[1], *(x.shape[2:] if how == "position" else (1, 1)))
            parameter = torch.randn(shape, generator=self.random)
            self.layers[name] = nn.ParameterDict({"added": nn.Parameter(parameter)})
        if self.building and how not in ("channel", "position", "shared"):
            step["fits"] = values[index].shape == x.shape
        if how in ("channel", "position"):
            return x + self.layers[name]["added"]
        if how == "shared":
            if self.building:
                firsts = {n: m[0] for n, m in self.layers.items() if isinstance(m, nn.Sequential)}
                convs = {n: m for n, m in firsts.items() if isinstance(m, nn.Conv2d)}
                fitting = (n for n, conv in convs.items() if conv.in_channels == x.shape[1])
                step["layer"] = next(fitting, None)
            return x if step["layer"] is None else self.layers[step["layer"]](x)
        if not step["fits"]:
            return x
        if how == "+=":
            x += values[index]
            return x
        return torch.add(x, values[index], alpha=2) if how == "alpha" else x + values[index]

    def _classified(self, x: Tensor) -> Tensor:
        if self.head == "none":
            return x
        if self.head == "view":
            x = x.contiguous().view(x.size(0), -1)
        elif self.head == "flatten":
            x = torch.flatten(x, 1)
        else:
            x = x.mean((2, 3))
        if self.building:
            features = x.shape[1]
            self.classifier = nn.Linear(features, features if self.head == "twice" else 5)
        fc = self.classifier
        if self.head == "keyword":
            return fc(input=x)
        if self.head == "computed":
            return F.linear(
                F.normalize(x, eps=1.0), F.normalize(fc.weight)
            )  # x may be 0 but for rounding
        if self.head == "twice":
            return fc(F.relu(fc(x)))
        if self.head == "float" and not (self.float64 and not self.building):
            return fc(x.float()).softmax(1)
        return fc(x).softmax(1) if self.head == "float" else fc(x)


def _convolution(step: dict[str, Any], channels: int, random: torch.Generator) -> nn.Sequential:
    outputs, groups, stride = step["outputs"], 1, step["stride"]
    if step["grouped"] == "depthwise":
        outputs = groups = channels
    elif step["grouped"] == "two" and channels % 2 == outputs % 2 == 0:
        groups = 2
    if step["padding"] == "same":
        stride = 1
    kind = _Standardised if step["weight"] == "standardised" else nn.Conv2d
    conv: nn.Module = kind(
        channels,
        outputs,
        step["kernel"],
        stride,
        step["padding"],
        step["dilation"],
        groups,
        step["bias"],
        step["padding_mode"],
    )
    if step["weight"] in ("weight_norm", "spectral_norm"):
        conv = getattr(parametrizations, step["weight"])(conv)
    elif step["weight"] == "old":
        conv = nn.utils.weight_norm(conv)
    elif step["weight"] == "pruned":
        prune.l1_unstructured(conv, "weight", amount=0.5)
    if step["hook"]:
        conv.register_forward_hook(_halve)
    layers = [conv]
    if "batch" in step["norm"]:
        layers.append(_batch_norm(outputs, step["norm"] == "batch", random))
    elif step["norm"] == "group":
        layers.append(nn.GroupNorm(1, outputs))
    elif step["norm"] == "instance":
        layers.append(nn.InstanceNorm2d(outputs, eps=0.1))
    return nn.Sequential(*layers).eval()


class _Standardised(nn.Conv2d):
    """A convolution of standardised weights (arXiv:1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        centred = self.weight - mean
        size = centred.square().mean((1, 2, 3), keepdim=True).sqrt() + 0.1
        return self._conv_forward(x, centred / size.expand_as(centred) * 0.3, self.bias)


def _batch_norm(channels: int, affine: bool, random: torch.Generator) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, affine=affine)
    norm.running_mean.copy_(torch.randn(channels, generator=random) * 0.3)
    norm.running_var.copy_(torch.rand(channels, generator=random) + 0.5)
    if affine:
        norm.weight.data.copy_(torch.randn(channels, generator=random))
        norm.bias.data.copy_(torch.randn(channels, generator=random) * 0.2)
    return norm.eval()


def _halve(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 0.5
