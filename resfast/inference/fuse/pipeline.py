"""The steps of a fusion: check the network, trace it, rewrite the graph, wrap it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from resfast import runtime
from resfast.errors import ResfastError
from resfast.inference.fuse.activations import name_activations
from resfast.inference.fuse.blocks import group_blocks
from resfast.inference.fuse.constants import fold_constants
from resfast.inference.fuse.copying import copied, unwrapped
from resfast.inference.fuse.layout import make_independent_of_layout
from resfast.inference.fuse.model import FusedModel
from resfast.inference.fuse.nodes import DTYPES
from resfast.inference.fuse.patterns import device_of
from resfast.inference.fuse.quantize import batches_of, check_device, quantize
from resfast.inference.fuse.rewrite import Rewriter
from resfast.inference.fuse.trace import trace
from resfast.ops.conv.op import ConvBiasAct

_QUANTISED = ("torch.ao.", "torch.quantization", "torchao.")
_FLOAT = (torch.ao.nn.quantized.FloatFunctional, torch.ao.quantization.QuantStub)
_FLOAT += (torch.ao.quantization.DeQuantStub,)
"""Modules of networks prepared for quantisation that compute in floating point."""


def fuse(
    model: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    *,
    example: Tensor | tuple[Any, ...] | dict[str, Any] | list[Any] | None = None,
    device: torch.device | str | None = None,
    cuda_graph: bool = False,
    calibration: Any = None,
    report: Callable[[str], object] | None = None,
) -> FusedModel:
    """A copy of a network for inference, with convolutions fused with the operations after them.

    Conv → batch norm → (+ residual) → activation becomes one
    :class:`~resfast.ops.conv.op.ConvBiasAct`, for ReLU, ReLU6, leaky ReLU, SiLU, exact GELU, hard
    swish, hard sigmoid, sigmoid and tanh, also where they are written out, as ``x * sigmoid(x)``.
    Other batch norms become part of the unpadded layers after them, or run as one operation with
    the activation after it and the concatenation before it. What depends on parameters only, such
    as standardised weights, is computed once. All other operations are kept, in ``dtype`` (batch
    norms and a final linear layer in float32), and named in the report. Operations after a
    convolution whose output has other users are not fused into it.

    The result can be exported with ``torch.export``, to be run with resfast, and with
    ``torch.onnx.export``, to be run without it.

    Args:
        model: any network in eval mode: resfast's, torchvision's, timm's, your own. It is not
            changed and shares no memory with the result.
        dtype: ``torch.bfloat16``, ``torch.float16``, ``torch.float32``, or ``torch.int8`` on a CPU:
            convolutions have 8-bit operands, and what is between them stays so (all else is
            float32). Images with NaN or infinity then have outputs of NaN.
        example: the network's inputs, on its device: a tuple, or the only one. Required if
            ``torch.fx`` cannot trace the network (later inputs may then differ in batch size only);
            otherwise used to infer shapes, which are inferred from 224x224 images without it.
            Arguments that it leaves out keep their defaults.
        device: device of the result; None for that of the model.
        cuda_graph: capture and replay a CUDA graph per input shape, for latency at small batches.
        calibration: images for the ranges of int8, some hundred as the network sees them: a batch,
            a tuple of all inputs, or an iterable of either, such as a ``DataLoader``, of which
            about the first thousand images are used.
        report: called with the text of the report, for example ``print``.

    Returns:
        The fused network. Its ``report`` lists what was fused and what was not.

    Raises:
        ResfastError: the model is in training mode, quantised, without weights, already fused or
            cannot be traced; forward hooks on all modules, or on a wrapper such as
            ``nn.DataParallel``; another dtype; ``cuda_graph`` without a CUDA device; int8 without
            calibration images or on another device than a CPU.
    """
    model = _checked(model, dtype)
    if example is not None and not isinstance(example, tuple):
        example = (example,)
    where = torch.device(device) if device is not None else device_of(model)
    if cuda_graph and (where.type != "cuda" or not torch.cuda.is_available()):
        raise ResfastError(
            f"cuda_graph=True needs a CUDA device, but the network would be on {where}; pass "
            "device='cuda' on a machine with one, or cuda_graph=False"
        )
    is_int8 = dtype == torch.int8
    if is_int8:
        check_device(where)
    elif calibration is not None:
        raise ResfastError(f"calibration is for torch.int8, but dtype is {dtype}")
    with torch.inference_mode(False), torch.no_grad():
        traced = trace(copied(model), example)
        batches = batches_of(calibration, traced.inputs) if is_int8 else []
        make_independent_of_layout(traced.network)
        fold_constants(traced.network)
        name_activations(traced.network)
        if is_int8:
            traced.network.to("cpu")
        operands = torch.float32 if is_int8 else dtype
        made = Rewriter(traced.network, operands, example, traced.by).run()
        if is_int8:
            made = replace(made, int8=quantize(traced.network, batches))
        else:
            made = replace(made, blocks=group_blocks(traced.network))
        traced.network.to(where)
    result = FusedModel(traced, dtype, made, cuda_graph)
    runtime.release_memory(where)  # of copies and graphs, much more than the result takes
    if report is not None:
        report(str(made))
    return result


def _checked(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Unwraps the network and checks that it can be fused."""
    if not isinstance(model, nn.Module):
        hint = "; pass its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise ResfastError(f"cannot fuse a {type(model).__name__}; expected an nn.Module{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ResfastError("cannot fuse a TorchScript module; fuse the nn.Module it was made from")
    if not isinstance(dtype, torch.dtype):
        hint = (
            "; pass inputs as example=" if isinstance(dtype, Tensor | tuple | dict | list) else ""
        )
        raise ResfastError(
            f"dtype is a {type(dtype).__name__}; expected {', '.join(map(str, DTYPES))}{hint}"
        )
    if dtype not in (*DTYPES, torch.int8):
        known = ", ".join(map(str, (*DTYPES, torch.int8)))
        raise ResfastError(f"dtype {dtype} is not supported; choose {known}")
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        raise ResfastError(
            "forward hooks are registered for all modules, and a fused network has other modules; "
            "remove them before fusing"
        )
    model = unwrapped(model)
    for name, module in model.named_modules():
        what = f"{name or 'the network'} ({type(module).__name__})"
        if isinstance(module, FusedModel | ConvBiasAct):
            raise ResfastError(f"{what} is already fused; fuse the original network")
        if type(module).__module__.startswith(_QUANTISED) and type(module) not in _FLOAT:
            raise ResfastError(f"{what} is quantised; fuse the network before quantising it")
        unwrapped(module)
        if module.training:
            raise ResfastError(
                f"{what} is in training mode; call model.eval() first, because batch norms are "
                "folded with their running statistics"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_quantized or tensor.is_complex():
            raise ResfastError(f"{name} is {tensor.dtype}; expected a floating-point network")
        if tensor.is_meta:
            raise ResfastError(f"{name} is on the meta device; load the weights first")
    return model
