"""Modules whose own forward has to change: operations in place go out of place, functional convolutions become layers.

A module stays the same object and an instance of its class, with its methods, attributes, hooks and children: it gets a
class that derives from its own, with the forward that the rewritten graph spells out (see generated.py).
"""

from dataclasses import dataclass, field

from torch import fx, nn

from .alone import own_graph
from .errors import ModelError
from .functional import arguments, is_conv3d, layer_for, layer_name
from .generated import source_of, with_forward
from .inplace import in_place, twin
from .rules import Plan
from .sites import FUNCTIONAL
from .tracer import IN_PLACE


@dataclass
class Surgery:
    """What is to change in one module's forward.

    Attributes:
        out_of_place: nodes of its graph that are to leave their operand alone.
        layers: names of the layers that are to take the place of functional convolutions.
    """

    out_of_place: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)


def surgeries(plan: Plan) -> dict[str, Surgery]:
    """Return what is to change in which module, by its name."""
    found: dict[str, Surgery] = {}
    for overwrite in plan.overwrites:
        if overwrite.obstacle is None:
            found.setdefault(overwrite.name, Surgery()).out_of_place.add(overwrite.node)
    for decision in plan.converted:
        if decision.site.kind == FUNCTIONAL:
            owner, _, layer = decision.site.name.rpartition(".")
            found.setdefault(owner, Surgery()).layers.add(layer)
    return found


def operate(module: nn.Module, surgery: Surgery) -> None:
    """Rewrite the module's forward: it gets another class, and the layers as children.

    Raises:
        ModelError: if the forward is not that of the plan.
    """
    try:
        graph = own_graph(module)
    except Exception as error:  # a user's forward may raise anything; it is named as the cause
        raise ModelError(f"the forward of {type(module).__name__} cannot be rewritten: {error}") from error
    layers = {node: layer_name(module, node.name) for node in graph.nodes if is_conv3d(node)}
    for node in list(graph.nodes):
        if node.name in surgery.out_of_place:
            _put_out_of_place(node)
        elif IN_PLACE in node.meta:
            node.target, node.args = in_place, (node.meta[IN_PLACE], *node.args)
        elif layers.get(node) in surgery.layers:
            module.add_module(layers[node], layer_for(module, node))
            _call_layer(node, layers[node])
    module.__class__ = with_forward(module, source_of(graph))


def _put_out_of_place(node: fx.Node) -> None:
    out_of_place = twin(node)
    if out_of_place is None:  # the plan is of another model
        raise ModelError(f"{node} is no operation in place that can be rewritten")
    old = node.all_input_nodes[0]
    node.target, node.kwargs = out_of_place
    with node.graph.inserting_after(node):
        # in place the type stays; out of place half + float would be float
        new = node.graph.call_method("type_as", (node, old))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user > node and user is not new)


def _call_layer(node: fx.Node, layer: str) -> None:
    given = arguments(node)
    tensors = (given["input"], given["weight"], *([given["bias"]] if given["bias"] is not None else []))
    with node.graph.inserting_after(node):
        node.replace_all_uses_with(node.graph.call_module(layer, tensors))
    node.graph.erase_node(node)
