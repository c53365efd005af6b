"""What inductor's graphs of a denoiser are rewritten to before it makes kernels of them."""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

aten, prims = torch.ops.aten, torch.ops.prims


class GraphPass(CustomGraphPass):
    """Complex products in real numbers, a tanh that is cheap, and nothing computed twice."""

    def __call__(self, graph: Graph) -> None:
        module = graph.owning_module
        assert module is not None  # inductor's graphs have one
        _rotate_in_reals(graph)
        _halve_tanh(graph)
        graph.eliminate_dead_code()
        # As torch does in training: layers of one input each make 8 bits of it.
        module.graph = fx_graph_cse(graph)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _call(graph: Graph, target: Any, *arguments: Any, **settings: Any) -> Node:
    made = graph.call_function(target, arguments, settings)
    values = [x.meta["val"] if isinstance(x, Node) else x for x in arguments]
    made.meta["val"] = target(*values, **settings)
    return made


def _rotate_in_reals(graph: Graph) -> None:
    """Write view_as_real(view_as_complex(pairs) * by), in either order, without a complex product.

    By these some transformers rotate queries and keys, and inductor has no kernels for complex numbers.
    (a + ib)(c + id) is (a, b) * c + (b, a) * (-d, d), which melts into what is around it.
    """
    for node in graph.find_nodes(op="call_function", target=aten.view_as_real.default):
        (product,) = node.args
        if product.target is not aten.mul.Tensor or not all(isinstance(x, Node) for x in product.args):
            continue
        made, by = sorted(product.args, key=lambda x: x.target is not aten.view_as_complex.default)
        if made.target is not aten.view_as_complex.default or not by.meta["val"].is_complex():
            continue
        (pairs,) = made.args
        value = pairs.meta["val"]
        with graph.inserting_before(node), value.fake_mode:
            parts = _call(graph, aten.view_as_real.default, by)
            c, d = (_call(graph, aten.slice.Tensor, parts, -1, part, part + 1) for part in (0, 1))
            place = {"dtype": torch.int64, "device": value.device, "requires_grad": False}
            signs = _call(graph, prims.iota.default, 2, start=-1, step=2, **place)
            swapped = _call(graph, prims.rev.default, pairs, [value.ndim - 1])
            turned = _call(graph, aten.mul.Tensor, swapped, _call(graph, aten.mul.Tensor, d, signs))
            kept = _call(graph, aten.mul.Tensor, pairs, c)
            written = _call(graph, aten.add.Tensor, kept, turned)
        node.replace_all_uses_with(written)


def _halve_tanh(graph: Graph) -> None:
    """Write 1 + tanh(x), of the usual GELU, as 2 sigmoid(2x): one exponential in place of libdevice's tanh,
    whose arithmetic takes a GPU longer than reading and writing the values."""
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        x, one = node.args
        if node.kwargs or one != 1 or not isinstance(x, Node) or x.target is not aten.tanh.default:
            continue
        with graph.inserting_before(node), node.meta["val"].fake_mode:
            doubled = _call(graph, aten.mul.Tensor, x.args[0], 2)
            written = _call(graph, aten.mul.Tensor, _call(graph, aten.sigmoid.default, doubled), 2)
        node.replace_all_uses_with(written)
