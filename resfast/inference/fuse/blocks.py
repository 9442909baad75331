"""Pairs of fused convolutions as residual basic blocks: :func:`group_blocks`."""

from __future__ import annotations

from torch import fx, nn

from resfast.ops.basic_block import op as basic_block


def group_blocks(network: fx.GraphModule) -> int:
    """Makes one :class:`~resfast.ops.basic_block.op.BasicBlock` of each residual basic block.

    That is a :class:`~resfast.ops.conv.op.ConvBiasAct` that only a second one reads, whose
    residual is the input of the first, wherever ``basic_block.applies`` to the two. The block holds
    the two modules themselves, beside the first of them, and computes what they compute.

    Args:
        network: a graph with fused convolutions, as :func:`resfast.fuse` makes it; rewritten in
            place.

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
    """The module that a node calls with that many values."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or node.kwargs:
        return None
    return network.get_submodule(node.target) if len(node.args) == inputs else None


def _free_name(network: fx.GraphModule, parent: str) -> str:
    """Of a module in ``parent`` that is not there yet."""
    base = name = f"{parent}.basic_block".removeprefix(".")
    taken, count = {name for name, _ in network.named_modules()}, 1
    while name in taken:
        name, count = f"{base}_{count}", count + 1
    return name
