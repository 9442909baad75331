"""The steps of a fusion: check the network, trace it, rewrite the graph, wrap it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from resfast.errors import ResfastError
from resfast.inference.fuse.blocks import group_blocks
from resfast.inference.fuse.model import FusedModel
from resfast.inference.fuse.nodes import DTYPES
from resfast.inference.fuse.patterns import device_of
from resfast.inference.fuse.rewrite import Rewriter
from resfast.inference.fuse.trace import trace
from resfast.ops.conv.op import ConvBiasAct


def fuse(
    model: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    *,
    example: Tensor | tuple[Tensor, ...] | None = None,
    device: torch.device | str | None = None,
    cuda_graph: bool = False,
    report: Callable[[str], object] | None = None,
) -> FusedModel:
    """A network for inference, its convolutions fused with what follows them.

    Conv → batch norm → (+ residual) → activation becomes one
    :class:`~resfast.ops.conv.op.ConvBiasAct`, for ReLU, leaky ReLU, SiLU and GELU (of erf). What
    cannot be fused stays as it is, in ``dtype`` (batch norms, and a linear layer that ends the
    network, in float32), and is named in the report. A convolution whose output something else
    reads too keeps what follows it outside.

    Args:
        model: any network in eval mode: resfast's, torchvision's, timm's, your own. It is left
            untouched and shares no memory with the result.
        dtype: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``.
        example: the network's positional inputs, on its device. Needed where ``torch.fx`` cannot
            trace it (then only the batch size may differ later); otherwise it tells the shapes of
            its maps, which are worked out for 224x224 images without it.
        device: where to put the result; None for where the model is.
        cuda_graph: capture and replay each shape of input, for latency at small batches.
        report: called with the report's text, for example ``print``.

    Returns:
        The fused network. Its ``report`` says what was done.

    Raises:
        ResfastError: the model is in training mode, quantised, without weights, fused already or
            cannot be traced; another dtype; ``cuda_graph`` without a CUDA device.
    """
    model = _checked(model, dtype)
    example = (example,) if isinstance(example, Tensor) else example
    where = torch.device(device) if device is not None else device_of(model)
    if cuda_graph and (where.type != "cuda" or not torch.cuda.is_available()):
        raise ResfastError(
            f"cuda_graph=True needs a CUDA device, and the network would be on {where}; choose "
            "device='cuda' on a machine with one, or cuda_graph=False"
        )
    with torch.inference_mode(False), torch.no_grad():
        model = copy.deepcopy(model).requires_grad_(False)
        network, shapes, traced_by = trace(model, example)
        made = Rewriter(network, dtype, example, traced_by).run()
        made = replace(made, blocks=group_blocks(network))
        network = network.to(where)
    result = FusedModel(network, dtype, made, cuda_graph, shapes)
    if report is not None:
        report(str(made))
    return result


def _checked(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network itself, out of wrappers around it, after a look at whether it can be fused."""
    if not isinstance(model, nn.Module):
        hint = "; pass its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise ResfastError(f"cannot fuse a {type(model).__name__}; expected an nn.Module{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ResfastError("cannot fuse a TorchScript module; fuse the nn.Module it was made from")
    if dtype not in DTYPES:
        raise ResfastError(f"dtype {dtype} is not supported; choose {', '.join(map(str, DTYPES))}")
    if hasattr(model, "_orig_mod"):
        model = model._orig_mod
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    for name, module in model.named_modules():
        what = f"{name or 'the network'} ({type(module).__name__})"
        if isinstance(module, FusedModel | ConvBiasAct):
            raise ResfastError(f"{what} is fused already; fuse the network it was made from")
        if type(module).__module__.startswith(("torch.ao.", "torch.quantization", "torchao.")):
            raise ResfastError(f"{what} is quantised; fuse the network before its quantisation")
        if module.training:
            raise ResfastError(
                f"{what} is in training mode; call model.eval() first, since batch norms are "
                "folded with their running statistics"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_quantized or tensor.is_complex():
            raise ResfastError(f"{name} is {tensor.dtype}; expected a floating-point network")
        if tensor.is_meta:
            raise ResfastError(f"{name} is on the meta device; load the weights first")
    return model
