"""What the tracers of trace.py and standin.py have in common. With these two files all that knows torch.fx.Tracer."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

IN_PLACE = "qconvert_in_place"
"""The key of a node's meta under which the operator stands that it was written with: "iadd" for ``x += y``."""


class InPlaceProxy(fx.Proxy):
    """A stand-in that notes an augmented assignment, which fx would take for ``x = x + y``."""


def _augmented(name: str) -> Any:
    def assign(self: fx.Proxy, other: Any) -> fx.Proxy:
        result: fx.Proxy = getattr(self, f"__{name}__")(other)
        result.node.meta[IN_PLACE] = f"i{name}"
        return result

    return assign


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(InPlaceProxy, f"__i{_name}__", _augmented(_name))


class NamingTracer(fx.Tracer):
    """What both tracers do: note what is in place, and make nodes of all Parameters and buffers."""

    # buffers as nodes: else their values, and what a forward computes from them, would be constants of the graph
    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the stand-in for what a node computes."""
        return InPlaceProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:  # noqa: ARG002 (fx's)
        """Return the stand-in for a Parameter or buffer: as fx does, which goes through all of them at each look."""
        if not isinstance(attr_val, Tensor):
            return attr_val
        name, _ = self._names.get(id(attr_val), ("", attr_val))
        if name and name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache.get(name, attr_val)

    @cached_property
    def _names(self) -> dict[int, tuple[str, Tensor]]:
        """Name and tensor by the tensor's identity. They are held: what is freed while tracing would leave its identity."""
        named = (*self.root.named_buffers(), *self.root.named_parameters())
        return {id(tensor): (name, tensor) for name, tensor in named}


@contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back what a forward that is traced sets on modules that are the user's own: their mode, a cache."""
    before = {module: vars(module).copy() for module in modules}
    try:
        yield
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)
