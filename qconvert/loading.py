"""A model from ``package.module:callable``, weights from a checkpoint, and the converted weights to a file."""

import importlib
import importlib.util
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    with _importing_beside(source):
        return _built(_imported(source), source, name, settings or {})


def _built(module: ModuleType, source: str, name: str, settings: Mapping[str, Any]) -> nn.Module:
    build: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(build):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise ModelError(f"{source} has no callable {name!r}.{did_you_mean(name, public)}")
    call = f"{source}:{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"
    try:
        model = build(**settings)
    except Exception as error:  # foreign code may raise anything; it is named as the cause
        raise ModelError(f"{call} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{call} returned {type(model).__name__}, not a torch.nn.Module")
    return model


@contextmanager
def _importing_beside(source: str) -> Iterator[None]:
    """Find the file's neighbours, or what lies in the working folder, as `python file.py` and `python -m` do."""
    folder = str(Path(source).resolve().parent if source.endswith(".py") else Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _imported(source: str) -> ModuleType:
    try:
        return _imported_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:  # foreign code may raise anything; it is named as the cause
        raise ModelError(f"cannot import {source!r}: {type(error).__name__}: {error}") from error


def _imported_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # pickling and dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
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
    # one tensor under several names: a file may hold it under one of them
    present = {expected[key].data_ptr() for key in expected.keys() & weights.keys()}
    missing = {key for key in expected.keys() - weights.keys() if expected[key].data_ptr() not in present}
    problems = [
        *listed("missing", missing),
        *listed("unexpected", weights.keys() - expected.keys()),
        *listed(
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
    model.load_state_dict(weights, strict=False)  # every name was compared above


def listed(what: str, names: set[str], most: int = 3) -> list[str]:
    """Return a line that says which names are something, none if there are none."""
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
    with whole_file(path) as partial:
        safetensors.torch.save_model(model, str(partial), metadata=dict(metadata))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of the file once it is whole; until then the old file stays.

    Raises:
        ModelError: if the file cannot be written.
    """
    if not path.name:
        raise ModelError(f"{str(path)!r} names no file to write")
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)  # safetensors leaves its files readable by their owner only
        partial.replace(path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch raises a RuntimeError on a full disk
        raise ModelError(f"{path} cannot be written: {error}") from error
    finally:
        if partial.is_file():  # whatever ended it, Ctrl-C too
            partial.unlink()
