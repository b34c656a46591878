"""A rule file to start from, for a given model."""

import json

from torch import nn

from .errors import ModelError
from .sites import CONV3D, Site
from .trace import trace

_EXCEPTIONS = {
    "first": "reads the raw input",
    "last": "no Conv3d behind it",
    "shortcut": "keeps a float path around the block",
}


def starting_rules(model: nn.Module) -> str:
    """Return a rule file, as TOML, with a rule for each kind of Conv3d and one for each role.

    Raises:
        ModelError: if the model has no Conv3d.
    """
    traced = trace(model)
    sites = [site for site in traced.sites if site.kind == CONV3D]
    name = type(traced.model).__name__
    if not sites:
        raise ModelError(f"{name} has no Conv3d to write rules for")
    kinds: dict[tuple[str, tuple[int, ...], str], list[Site]] = {}
    for site in sites:
        kinds.setdefault((site.type, site.kernel_size, site.grouping), []).append(site)
    header = [
        f"# Rules for {name}: {len(sites)} Conv3d. Later rules override earlier ones, key by key.",
        "",
        "[model]",
        f"family = {json.dumps(name)}",
        "# input_shape = [1, 3, 16, 112, 112]  # for the FLOPs of the report",
    ]
    tables = [header, *(_kind_rule(*kind, members) for kind, members in kinds.items())]
    for role in _EXCEPTIONS:
        members = [site for site in sites if role in site.roles]
        if members:
            tables.append(_role_rule(role, members))
    return "\n\n".join("\n".join(table) for table in tables) + "\n"


def _role_rule(role: str, members: list[Site]) -> list[str]:
    reason = f'reason = "{role}: {_EXCEPTIONS[role]}"'
    return ["[[rule]]", f"# {_examples(members)}", f'role = "{role}"', "quantize = false", reason]


def _kind_rule(type_: str, kernel_size: tuple[int, ...], grouping: str, members: list[Site]) -> list[str]:
    lines = [
        "[[rule]]",
        f"# {_examples(members)}",
        f"type = {json.dumps(type_)}",
        f"kernel_size = {list(kernel_size)}",
        f'groups = "{grouping}"',
    ]
    if grouping == "depthwise":
        lines += ["quantize = false", 'reason = "depthwise: few operations, large loss"']
    else:
        lines += [
            'weight = { quantizer = "sign", scale = "channel" }',
            'input = { quantizer = "approxsign", threshold = "channel" }',
            'reason = "binary"',
        ]
    return lines


def _examples(members: list[Site]) -> str:
    names = [site.name or "the model itself" for site in members]
    return f"{len(names)} x: {', '.join(names[:3])}{', ...' if len(names) > len(names[:3]) else ''}"
