"""The stand-ins that one module's own forward is run on, which note where a tensor would have made it do something else.

fx's own raise where they have no answer, which a forward may swallow, and answer where they should not: they are no tensor,
and have every attribute.
"""

import dis
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch.fx.proxy import TraceError

from .tracer import InPlaceProxy, NamingTracer

_Place = tuple[object, int]
"""Code, and which of its instructions."""


class OwnTracer(NamingTracer):
    """Keeps every submodule whole, and refuses what the graph would not tell: even where the forward goes on.

    Args:
        given: arguments that have a value of their own.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.given = given
        self.context = _context()
        self.asked: dict[_Place, str] = {}
        self.looked_at: list[_Attribute] = []
        self.refusals: list[str] = []

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph.

        Raises:
            TraceError: if something was refused, whatever the forward has made of it.
        """
        try:
            graph = super().trace(root, concrete_args)
        finally:
            reasons = (*self.asked.values(), *self.refusals)
            if reasons:
                raise TraceError(reasons[0])
        for attribute in self.looked_at:
            if not attribute.is_used:
                raise TraceError(f"it looks at {attribute.attr!r} of a value in Python")
        return graph

    def refuse(self, reason: str) -> NoReturn:
        """Stop the forward, for a reason that stands even if it does not stop."""
        self.refusals.append(reason)
        raise TraceError(reason)

    def is_leaf_module(self, *_: Any) -> bool:
        """Whether a module is one node: each is."""
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the stand-in for what a node computes."""
        return StandIn(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Note an operation, if it runs as all the others do."""
        if _context() != self.context:
            self.refuse("part of it runs under no_grad, autocast, checkpointing or the like")
        return super().create_node(*args, **kwargs)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        """Note an operation, and return the stand-in for what it computes; for an argument perhaps the value given."""
        if kind == "placeholder" and target in self.given:
            return self.given[target]
        # torch.zeros((n,)) asks, too, whether n is a number, and then comes here
        self.asked.pop(_place(_frame_of_the_user()), None)
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def to_bool(self, obj: fx.Proxy) -> bool:  # noqa: ARG002 (fx's)
        """Refuse ``if x``."""
        self.refuse(_VALUE)

    def iter(self, obj: fx.Proxy) -> Any:  # noqa: ARG002 (fx's)
        """Refuse ``for y in x``."""
        self.refuse(_VALUE)

    def keys(self, obj: fx.Proxy) -> Any:  # noqa: ARG002 (fx's)
        """Refuse ``**x``."""
        self.refuse(_VALUE)


class StandIn(InPlaceProxy):
    """A stand-in that notes what it is asked."""

    tracer: OwnTracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # isinstance, a class pattern and singledispatch come here: it is of none of their types
        frame = sys._getframe(1)
        while frame.f_code.co_name == "__instancecheck__" and frame.f_back is not None:
            frame = frame.f_back
        if not _is_torchs(frame):
            self.tracer.asked[_place(frame)] = "it asks for the type of a value"
        return type(self)

    def __getattr__(self, name: str) -> "_Attribute":
        if not hasattr(Tensor, name) and not _is_written_out(sys._getframe(1)):
            self.tracer.refuse(f"it asks for {name!r}, which a tensor lacks")
        attribute = _Attribute(self, name)
        self.tracer.looked_at.append(attribute)
        return attribute


class _Attribute(StandIn, fx.proxy.Attribute):
    """An attribute of a stand-in. Where no operation reads it, Python does: ``x.dtype is torch.half``, hasattr(x, "T")."""

    is_called = False

    @property
    def is_used(self) -> bool:
        """Whether an operation reads it."""
        return self.is_called or self._node is not None

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        self.is_called = True
        return super().__call__(*args, **kwargs)


_VALUE = "what it does depends on a value"
_CONVERSIONS = ("len", "float", "int", "index", "complex", "contains", "reversed", "array", "hash")


def _refusing(reason: str) -> Any:
    def refused(self: StandIn, *_: Any) -> NoReturn:
        self.tracer.asked[_place(_frame_of_the_user())] = reason
        raise TraceError(reason)

    return refused


for _name in _CONVERSIONS:
    setattr(StandIn, f"__{_name}__", _refusing(_VALUE))
for _name in ("setitem", "delitem"):
    setattr(StandIn, f"__{_name}__", _refusing("it assigns to a part of a value"))


def _frame_of_the_user() -> FrameType:
    frame = sys._getframe(1)
    while _is_torchs(frame) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _is_written_out(frame: FrameType) -> bool:
    """Whether the code says ``x.foo``, which the graph says, too: not hasattr or getattr with a default."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] in ("LOAD_ATTR", "LOAD_METHOD")


def _is_torchs(frame: FrameType) -> bool:
    """Whether the code is torch's or our own, which ask for themselves; torch.is_tensor and torch.jit.isinstance do not."""
    name: str = frame.f_globals.get("__name__", "")
    return name.startswith(("torch.", "qconvert.")) and name != torch._jit_internal.__name__


def _place(frame: FrameType) -> _Place:
    return frame.f_code, frame.f_lasti


def _context() -> tuple[Any, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, hooks)
