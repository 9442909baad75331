"""Pairs of fused convolutions as residual basic blocks: :func:`group_blocks`."""

from __future__ import annotations

from torch import fx, nn

from resfast.ops.basic_block import op as basic_block


def group_blocks(network: fx.GraphModule) -> int:
    """Replaces each residual block by one :class:`~resfast.ops.basic_block.op.BasicBlock`.

    A residual block is a :class:`~resfast.ops.conv.op.ConvBiasAct` read only by a second one whose
    residual is the input of the first, if ``basic_block.applies`` to the pair. The new module holds
    the two convolutions, has the same parent as the first, and computes the same result.

    Args:
        network: a graph of fused convolutions from :func:`resfast.fuse`; rewritten in place.

    Returns:
        The number of blocks.
    """
    graph, count = network.graph, 0
    for second in list(graph.nodes):
        conv2 = _call(second, network, 2)
        if conv2 is None:
            continue
        first, x = second.args
        conv1 = _call(first, network, 1)
        if conv1 is None or first.args[0] is not x or set(first.users) != {second}:
            continue
        if not basic_block.applies(conv1, conv2):
            continue
        name = _free_name(network, first.target.rpartition(".")[0])
        network.add_submodule(name, basic_block.BasicBlock(conv1, conv2))
        with graph.inserting_before(second):
            block = graph.call_module(name, (x,))
        block.meta = dict(second.meta)
        second.replace_all_uses_with(block)
        graph.erase_node(second)
        graph.erase_node(first)
        count += 1
    if count:
        network.delete_all_unused_submodules()
        graph.lint()
        network.recompile()
    return count


def _call(node: object, network: fx.GraphModule, inputs: int) -> nn.Module | None:
    """The module that a node calls with ``inputs`` arguments, or None."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or node.kwargs:
        return None
    return network.get_submodule(node.target) if len(node.args) == inputs else None


def _free_name(network: fx.GraphModule, parent: str) -> str:
    """An unused name for a new submodule of ``parent``."""
    base = name = f"{parent}.basic_block".removeprefix(".")
    taken, count = {name for name, _ in network.named_modules()}, 1
    while name in taken:
        name, count = f"{base}_{count}", count + 1
    return name
