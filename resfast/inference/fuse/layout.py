"""Makes a traced graph independent of memory layout: :func:`make_independent_of_layout`."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from resfast.errors import ResfastError
from resfast.inference.fuse.nodes import aten

VIEWS = {
    "view": "reshape",
    "view_as": "reshape_as",
    Tensor.view: torch.reshape,
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}
"""Views that are valid for some strides only, and what has the same values for all."""
BY_STRIDE = {
    "as_strided",
    "as_strided_copy",
    "stride",
    "storage_offset",
    "data_ptr",
    "set",
    "resize",
}


def make_independent_of_layout(network: fx.GraphModule) -> None:
    """Replaces views by reshapes: images are in ``channels_last`` in the fused network.

    Raises:
        ResfastError: an operation whose values depend on the memory layout.
    """
    for node in list(network.graph.nodes):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        name = name.partition(".")[0]
        if not node.op.startswith("call_") or node.op == "call_module":
            continue
        if name in BY_STRIDE:
            raise ResfastError(
                f"the network calls {name}, which depends on the memory layout, and fusing changes "
                "that; use reshape, permute or unfold instead, or fuse only the other submodules"
            )
        if node.target is aten._assert_tensor_metadata.default:
            network.graph.erase_node(node)
        elif node.target in VIEWS:
            arguments = (*node.args[1:], *node.kwargs.values())
            if any(isinstance(value, torch.dtype) for value in arguments):
                raise ResfastError(
                    "the network reads the bits of a tensor as another dtype with view(dtype); "
                    "fuse only the other submodules"
                )
            node.target = VIEWS[node.target]
            if "size" in node.kwargs:
                node.args, node.kwargs = (*node.args, node.kwargs["size"]), {}
