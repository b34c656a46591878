"""A model from ``package.module:callable``, weights from a checkpoint, and the converted weights to a file."""

import importlib
import importlib.util
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .errors import ModelError, did_you_mean

_WEIGHT_KEYS = ("state_dict", "model_state_dict", "model_state", "model")
"""Where training scripts put the weights in a checkpoint that holds more than them."""


def build_model(spec: str, settings: Mapping[str, Any] | None = None) -> nn.Module:
    """Return the model that ``package.module:callable`` or ``file.py:callable`` makes.

    Args:
        spec: what to import and call.
        settings: keyword arguments of the call.

    Raises:
        ModelError: if it cannot be imported, does not exist, raises, or returns no module.
    """
    source, _, name = spec.partition(":")
    if not source or not name:
        raise ModelError(f"MODEL is package.module:callable or file.py:callable, got {spec!r}")
    module = _imported(source)
    build: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(build):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise ModelError(f"{source} has no callable {name!r}.{did_you_mean(name, public)}")
    call = f"{spec}({', '.join(f'{key}={value!r}' for key, value in (settings or {}).items())})"
    try:
        model = build(**(settings or {}))
    except Exception as error:  # foreign code may raise anything; it is named as the cause
        raise ModelError(f"{call} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{call} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _imported(source: str) -> ModuleType:
    try:
        if source.endswith(".py"):
            return _imported_file(Path(source))
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; a console script has its own folder there
        try:
            return importlib.import_module(source)
        finally:
            sys.path.remove(str(Path.cwd()))
    except Exception as error:  # foreign code may raise anything; it is named as the cause
        raise ModelError(f"cannot import {source!r}: {type(error).__name__}: {error}") from error


def _imported_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # pickling and dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load weights into the model, strictly. If they do not fit, the model is as it was.

    Args:
        model: the float model.
        path: a .safetensors file, or one that ``torch.load(weights_only=True)`` reads: nothing is ever unpickled.

    Raises:
        ModelError: if the file is no checkpoint, or its tensors are not those of the model.
    """
    weights = _read(path)
    nn.modules.utils.consume_prefix_in_state_dict_if_present(weights, "module.")  # saved from DataParallel or DDP
    expected = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    problems = [
        *_listed("missing", expected.keys() - weights.keys()),
        *_listed("unexpected", weights.keys() - expected.keys()),
        *_listed(
            "of another shape",
            {
                f"{key} {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
                for key in expected.keys() & weights.keys()
                if weights[key].shape != expected[key].shape
            },
        ),
    ]
    if problems:
        raise ModelError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(weights)


def _listed(what: str, names: set[str], most: int = 3) -> list[str]:
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return [f"{what}: {', '.join(sorted(names)[:most])}{more}"] if names else []


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser fed with any bytes may raise anything; it is named as the cause
        cause = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if isinstance(error, pickle.UnpicklingError):
            cause = "it holds Python objects, which are never unpickled; save the model's state_dict() instead"
        raise ModelError(f"{path} is not a checkpoint of tensors: {cause}") from error
    for key in _WEIGHT_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path} holds no state dict: expected tensors by name, got {type(content).__name__}")
    return dict(content)


def save_weights(model: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the model's state dict, latent weights in float, as one safetensors file. The old file stays until it is whole.

    Raises:
        ModelError: if the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        safetensors.torch.save_model(model, str(partial), metadata=dict(metadata))
        partial.chmod(0o644)  # safetensors leaves its files readable by their owner only
        partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ModelError(f"{path} cannot be written: {error}") from error
