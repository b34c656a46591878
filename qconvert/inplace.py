"""In-place operations that break autograd: they overwrite a value that the backward pass needs.

Which those are is told from the graph: a value is needed by what made it (ReLU keeps its output) or by what has read it (a
convolution keeps its input). docs/tracing.md says what is done about them.
"""

import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor, fx, nn

from .alone import own_forward
from .functional import owner_name
from .sites import Overwrite
from .tracer import IN_PLACE


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_KEEP_OUTPUT = _words(
    """relu sigmoid tanh exp exp2 expm1 sqrt rsqrt reciprocal tan softmax logsoftmax softmin amax amin std norm logsumexp
    prod cumprod scaleddotproductattention"""
)
_KEEP_OUTPUT_IN_PLACE = _words("leakyrelu elu selu celu rrelu")
_KEEP_INPUT = _words(
    """log log2 log10 log1p sin cos sinh cosh asin acos atan erf abs square clamp clip clampmin clampmax softplus relu6
    leakyrelu elu selu celu rrelu hardtanh hardsigmoid hardswish silu mish gelu softsign softshrink hardshrink logsigmoid
    threshold prelu glu batchnorm syncbatchnorm instancenorm groupnorm layernorm localresponsenorm rmsnorm maxpool avgpool
    adaptiveavgpool adaptivemaxpool lppool conv convtranspose linear bilinear pow matmul mm bmm einsum baddbmm addmm var std
    norm normalize maximum minimum amax amin logsumexp prod cumprod scaleddotproductattention multiheadattention
    replicationpad reflectionpad"""
)
_KEEP_OTHER = _words("mul multiply div divide truediv addcmul addcdiv")
"""They keep an input for the gradient of the others: of a number there is none."""

_SAME_MEMORY = _words(
    """view viewas reshape flatten unflatten permute transpose swapaxes movedim squeeze unsqueeze expand expandas narrow
    select chunk split tensorsplit unbind getitem t contiguous to float half type typeas detach identity dropout
    featuredropout alphadropout unfold diagonal real"""
)
"""What returns its input, or may: a view, a conversion to the type that it has, dropout in eval mode."""

_VIEW_ATTRIBUTES = ("T", "mT", "H", "mH", "real", "imag", "data")

_NO_VALUES = _words("squeeze_ unsqueeze_ t_ transpose_ swapaxes_ detach_ requires_grad_ rename_ resize_ set_")
"""Methods with an underscore that write no values."""


_SWITCH = "set its inplace to False"


def overwrites(model: nn.Module, graphs: Mapping[str, fx.Graph]) -> tuple[Overwrite, ...]:
    """Return the in-place operations in the graphs that break autograd, and whether each can be rewritten."""
    return tuple(found for region, graph in graphs.items() for found in _in_region(model, region, graph))


def _in_region(model: nn.Module, region: str, graph: fx.Graph) -> Iterator[Overwrite]:
    by_owner: dict[str, list[_Write]] = {}
    for write in _Flow(graph, model.get_submodule(region)).writes:
        by_owner.setdefault(owner_name(region, write.node), []).append(write)
    for name, writes in by_owner.items():
        if any(write.reason for write in writes):
            yield from _in_module(name, model.get_submodule(name), writes)


def _in_module(name: str, owner: nn.Module, writes: list["_Write"]) -> Iterator[Overwrite]:
    """Yield what breaks autograd in one module's code, all its calls in a region taken together."""
    own = own_forward(owner)
    graph = None if own.obstacle else own.graph
    # a module that works in place is the owner of its own node in the region, and a child's in the graph of its caller
    own_writes = [write for write in _Flow(graph, owner).writes if write.node.op != "call_module"] if graph else []
    if not own_writes or len(writes) % len(own_writes):
        for write in writes:
            if write.reason is not None:
                obstacle = _SWITCH if write.node.op == "call_module" else own.obstacle or "its calls differ"
                yield Overwrite(name, type(owner).__name__, "", write.reason, obstacle)
        return
    for index, own_write in enumerate(own_writes):
        calls = writes[index :: len(own_writes)]
        reasons = [write.reason for write in calls if write.reason is not None]
        if reasons:
            refusal = next((write.obstacle for write in (own_write, *calls) if write.obstacle is not None), None)
            yield Overwrite(name, type(owner).__name__, own_write.node.name, reasons[0], refusal)


def in_place(operator_name: str, value: Any, other: Any) -> Any:
    """Return ``value += other`` and the like, by the operator's name: what a rewritten forward calls where that stays."""
    return getattr(operator, operator_name)(value, other)


def twin(node: fx.Node) -> tuple[Any, dict[str, Any]] | None:
    """Return target and keyword arguments of the node that does the same out of place, None if there is none."""
    if IN_PLACE in node.meta:
        return node.target, dict(node.kwargs)  # fx has taken the assignment for one already
    if node.op == "call_method" and hasattr(Tensor, str(node.target)[:-1]):
        return str(node.target)[:-1], dict(node.kwargs)
    if node.op == "call_function" and node.kwargs.get("inplace"):
        return node.target, {**node.kwargs, "inplace": False}
    if node.op == "call_function":
        name = node.target.__name__[:-1]  # type: ignore[union-attr]
        function = next((getattr(space, name) for space in (torch, F) if hasattr(space, name)), None)
        return None if function is None else (function, dict(node.kwargs))
    return None


@dataclass(frozen=True)
class _Write:
    """An operation in place.

    Attributes:
        node: the node.
        reason: why it breaks autograd, or None.
        obstacle: why it cannot be rewritten out of place without another effect, or None.
    """

    node: fx.Node
    reason: str | None
    obstacle: str | None


class _Flow:
    """The operations in place of a graph, judged in their order; one that can be rewritten counts as if it was."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.writes: list[_Write] = []
        nodes = list(graph.nodes)
        if not any(map(self._writes_in_place, nodes)):
            return
        self._made: dict[fx.Node, frozenset[fx.Node]] = {}  # the nodes whose memory a value surely is, or may be
        self._may_be: dict[fx.Node, frozenset[fx.Node]] = {}
        self._values: dict[fx.Node, list[fx.Node]] = {}  # the values that surely are, or may be, a node's memory
        self._perhaps: dict[fx.Node, list[fx.Node]] = {}
        self._readers: dict[fx.Node, list[fx.Node]] = {}
        self._now: dict[fx.Node, fx.Node] = {}  # the value that a rewritten operation has put in another's place
        for node in nodes:
            is_new = False
            if self._writes_in_place(node):
                value = self._current(node.all_input_nodes[0])
                write = _Write(node, self._reason(value), self._obstacle(node, value))
                self.writes.append(write)
                is_new = write.reason is not None and write.obstacle is None
                if is_new:
                    self._now[value] = node
            self._place(node, is_new)

    def _current(self, value: fx.Node) -> fx.Node:
        return self._current(self._now[value]) if value in self._now else value

    def _place(self, node: fx.Node, is_new: bool) -> None:
        inputs = [self._current(value) for value in node.all_input_nodes]
        for value in inputs:
            self._readers.setdefault(value, []).append(node)
        is_same = not is_new and (self._writes_in_place(node) or self._returns_input(node))
        shared = inputs[:1] if is_same else []
        perhaps = inputs if self._is_foreign(node) else shared
        for memory, values, sources in ((self._made, self._values, shared), (self._may_be, self._perhaps, perhaps)):
            memory[node] = frozenset[fx.Node]().union(*(memory[value] for value in sources)) or frozenset({node})
            for made in memory[node]:
                values.setdefault(made, []).append(node)

    def _reason(self, value: fx.Node) -> str | None:
        for made in self._made[value]:
            for same in self._values[made]:
                if self._keeps_output(same):
                    return f"what {self._title(same)} has returned and needs for its gradient"
                for reader in self._readers.get(same, []):
                    if self._keeps_input(reader, same):
                        return f"what {self._title(reader)} has read and needs for its gradient"
        return None

    def _obstacle(self, node: fx.Node, value: fx.Node) -> str | None:
        if twin(node) is None:
            return _SWITCH if node.op == "call_module" else "it has no twin out of place"
        for made in self._may_be[value]:
            if made.op == "placeholder":
                return "what it overwrites may be an argument, which the caller sees"
            if made.op == "get_attr":
                return f"it overwrites the model's own {made.target}"
            for same in self._perhaps[made]:
                # the value itself is read in its new version, but a view of it, or what it is a view of, would be an old one
                if self._current(same) is not value and any(reader > node for reader in same.users):
                    return "what it overwrites is read later by another name"
        return None

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _is_foreign(self, node: fx.Node) -> bool:
        """Whether it is not known what the node does: code that is not torch's."""
        module = self._module(node)
        if module is not None:
            return not type(module).__module__.startswith("torch.") and not isinstance(module, nn.Conv3d)
        space = getattr(node.target, "__module__", None) or "torch"
        return node.op == "call_function" and space.partition(".")[0] not in ("torch", "_operator", "math")

    def _writes_in_place(self, node: fx.Node) -> bool:
        if node.op == "call_method":
            name = str(node.target)
            return name.endswith("_") and not name.endswith("__") and name not in _NO_VALUES
        if node.op == "call_module":
            return getattr(self._module(node), "inplace", False) is True
        if node.op != "call_function":
            return False
        name = getattr(node.target, "__name__", "")
        return IN_PLACE in node.meta or bool(node.kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))

    def _returns_input(self, node: fx.Node) -> bool:
        return self._word(node) in _SAME_MEMORY or (node.target is getattr and node.args[1] in _VIEW_ATTRIBUTES)

    def _keeps_output(self, node: fx.Node) -> bool:
        word = self._word(node)
        return word in _KEEP_OUTPUT or (word in _KEEP_OUTPUT_IN_PLACE and self._writes_in_place(node))

    def _keeps_input(self, node: fx.Node, value: fx.Node) -> bool:
        inputs = [self._current(each) for each in node.all_input_nodes]
        if self._writes_in_place(node) and inputs[0] is value:
            return False  # torch keeps a copy of it
        word = self._word(node)
        operands = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, fx.Node)]
        return (
            isinstance(self._module(node), nn.Conv3d)
            or (word in _KEEP_INPUT and not self._pools_to_one(node))
            or (word in _KEEP_OTHER and len(operands) > 1)
        )

    def _pools_to_one(self, node: fx.Node) -> bool:
        """Whether it is an adaptive pooling to one value, which torch computes as a mean."""
        if self._word(node) != "adaptiveavgpool":
            return False
        argument = node.kwargs["output_size"] if "output_size" in node.kwargs else node.args[-1]
        size = getattr(self._module(node), "output_size", argument)
        sizes = size if isinstance(size, (tuple, list)) else (size,)
        return all(each == 1 for each in sizes)

    def _title(self, node: fx.Node) -> str:
        module = self._module(node)
        return type(module).__name__ if module is not None else str(getattr(node.target, "__name__", node.target))

    def _word(self, node: fx.Node) -> str:
        """Return one word for class, function and method: "batchnorm" for BatchNorm3d and batch_norm."""
        if node.op in ("placeholder", "get_attr", "output"):
            return ""
        return re.sub(r"(?<=[a-z])\dd$", "", self._title(node).lower().replace("_", ""))
