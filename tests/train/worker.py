"""What each process of a distributed run does: it trains every case, saves it, and loads what one process has saved.

`test_distributed.py` starts it with torchrun, and runs the same functions in one process without any group.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import qconvert

RULES = {"w1a1": "default", "w4a4": "low-bit"}
STAGES = {
    "mixed": [{"steps": 2, "weight": "identity"}, {"steps": 2, "transition": "linear"}],
    "bits": [{"steps": 2, "weight": {"quantizer": "lsq", "bits": bits}} for bits in (8, 2)],
    "layerwise": [{"steps": 4, "weight": "identity", "transition": "layerwise"}],
}
THRESHOLDS = (0.25, None)
STEPS = 6
SAVED_AFTER = 3


def network(seed: int = 0) -> nn.Module:
    """Return a converted network whose loss is a mean over samples: no layer takes statistics of a batch.

    In float64, where no rounding error is as large as the distance of a value to its threshold.
    """
    torch.manual_seed(seed)

    def block(inputs: int) -> list[nn.Module]:
        return [nn.Conv3d(inputs, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()]

    head = [nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*block(2), *block(8), *block(8), *head).double()


def converted(rules: str, seed: int = 0) -> nn.Module:
    return qconvert.binarize(network(seed), RULES[rules], report=False)


def sharded(model: nn.Module, **settings) -> nn.Module:
    """Shard each quantized layer for itself, and the rest together."""
    for layer in model.modules():
        if isinstance(layer, qconvert.QConv3d):
            fully_shard(layer, **settings)
    return fully_shard(model, **settings)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": DistributedDataParallel, "fsdp": sharded}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(qconvert.train.parameter_groups(model, lr=0.01, latent_lr=2.0))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    first: int,
    last: int,
    schedule: qconvert.train.Schedule | None = None,
) -> list[float]:
    """Return the losses of the steps ``first .. last - 1``, means over the batch that the processes share."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        clips = torch.randn(4, 2, 4, 6, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (4,), generator=generator)
        loss = F.cross_entropy(model(clips.chunk(processes)[rank]), labels.chunk(processes)[rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(_mean(loss.detach()))
    return losses


def _mean(loss: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole of every Parameter and buffer, as it is now."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {key: value.clone() for key, value in state.items()}


def run(rules: str, wrapper: str, folder: Path) -> None:
    """Train, save on the way, and load: what these processes have saved, and what one has."""
    folder.mkdir(exist_ok=True)
    wrap = WRAPPERS[wrapper]
    model = wrap(converted(rules))
    optimizer = optimizer_of(model)
    curves = {"trained": train(model, optimizer, 0, SAVED_AFTER)}
    save(model, optimizer, folder / "checkpoint")
    states = {"saved": whole_state(model)}
    curves["trained"] += train(model, optimizer, SAVED_AFTER, STEPS)
    for name, checkpoint in {"loaded": folder / "checkpoint", "loaded from one": folder.parent / rules}.items():
        model = wrap(converted(rules, seed=1))
        optimizer = optimizer_of(model)
        load(model, optimizer, checkpoint)
        states[name] = whole_state(model)
        curves[name] = train(model, optimizer, SAVED_AFTER, STEPS)
    if dist.get_rank() == 0:
        torch.save(states, folder / "states.pt")
        (folder / "curves.json").write_text(json.dumps(curves))


def train_in_stages(stages: str, wrap: Callable[[nn.Module], nn.Module]) -> list[float]:
    """Return the losses of a training with a schedule."""
    model = converted("w1a1")
    schedule = qconvert.train.Schedule(model, STAGES[stages])
    model = wrap(model)
    return train(model, optimizer_of(model), 0, STEPS, schedule)


def single_layer(threshold: float | None) -> tuple[nn.Module, Tensor]:
    """Return a layer and its input, both of numbers that bfloat16 has, and sums below 256, so that they are exact."""
    layer = qconvert.QConv3d(8, 8, 3, padding=1, threshold=threshold, spread=0.5)
    return nn.Sequential(layer), torch.arange(-512, 512).view(2, 8, 4, 4, 4) % 61 / 8 - 3.75


def run_in_bfloat16(threshold: float | None, file: Path) -> None:
    """Run a layer of which bfloat16 copies are gathered, in training and in evaluation."""
    torch.manual_seed(0)
    model, x = single_layer(threshold)
    sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    results = {"trained": model(x)}
    results["trained"].float().square().mean().backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        results["evaluated"] = model.eval()(x)
    if dist.get_rank() == 0:
        torch.save((results, gradients), file)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    place = Path(sys.argv[1])
    for each in RULES:
        for kind in WRAPPERS:
            run(each, kind, place / f"{each} {kind}")
    in_stages = WRAPPERS | {"ddp": partial(DistributedDataParallel, find_unused_parameters=True)}
    losses = {f"{each} {kind}": train_in_stages(each, wrap) for each in STAGES for kind, wrap in in_stages.items()}
    if dist.get_rank() == 0:
        (place / "stages.json").write_text(json.dumps(losses))
    for threshold in THRESHOLDS:
        run_in_bfloat16(threshold, place / f"{threshold}.pt")
    dist.destroy_process_group()
