"""Two processes, started by torchrun, train as one does: the same losses, and checkpoints that either can load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worker
from torch.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # so it is, in one process

every_rule = pytest.mark.parametrize("rules", worker.RULES)
every_wrapper = pytest.mark.parametrize("wrapper", worker.WRAPPERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where one process has saved each case half-way, and two processes have left what they found."""
    place = tmp_path_factory.mktemp("distributed")
    for rules in worker.RULES:
        model = worker.converted(rules)
        optimizer = worker.optimizer_of(model)
        worker.train(model, optimizer, 0, worker.SAVED_AFTER)
        worker.save(model, optimizer, place / rules)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, worker.__file__, str(place)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return place


def found(folder: Path, rules: str, wrapper: str):
    case = folder / f"{rules} {wrapper}"
    return json.loads((case / "curves.json").read_text()), torch.load(case / "states.pt")


def curve_of_one_process(rules: str) -> list[float]:
    model = worker.converted(rules)
    return worker.train(model, worker.optimizer_of(model), 0, worker.STEPS)


@every_rule
@every_wrapper
def test_losses_are_those_of_one_process(folder: Path, rules: str, wrapper: str):
    curves, _ = found(folder, rules, wrapper)
    expected = curve_of_one_process(rules)
    assert curves["trained"] == pytest.approx(expected, rel=1e-9)
    assert curves["loaded"] == curves["trained"][worker.SAVED_AFTER :]
    assert curves["loaded from one"] == pytest.approx(expected[worker.SAVED_AFTER :], rel=1e-9)


@every_wrapper
@pytest.mark.parametrize("stages", worker.STAGES)
def test_losses_of_a_schedule_are_those_of_one_process(folder: Path, stages: str, wrapper: str):
    losses = json.loads((folder / "stages.json").read_text())[f"{stages} {wrapper}"]
    assert losses == pytest.approx(worker.train_in_stages(stages, lambda model: model), rel=1e-9)


@every_rule
def test_everything_is_learned(folder: Path, rules: str):
    start, (_, states) = worker.converted(rules).state_dict(), found(folder, rules, "fsdp")
    learned = {key.rpartition(".")[2] for key, value in start.items() if not torch.equal(value, states["saved"][key])}
    assert learned == {"weight", "bias"} | ({"threshold", "scale", "offset"} if rules == "w1a1" else {"step"})


@every_rule
@every_wrapper
def test_checkpoints_load_on_as_many_processes(folder: Path, rules: str, wrapper: str):
    _, states = found(folder, rules, wrapper)
    assert_same(states["loaded"], states["saved"])


@every_rule
@every_wrapper
def test_a_checkpoint_of_two_processes_loads_on_one(folder: Path, rules: str, wrapper: str):
    curves, states = found(folder, rules, wrapper)
    model = worker.converted(rules, seed=1)
    optimizer = worker.optimizer_of(model)
    worker.load(model, optimizer, folder / f"{rules} {wrapper}" / "checkpoint")
    assert_same(model.state_dict(), states["saved"])
    rest = worker.train(model, optimizer, worker.SAVED_AFTER, worker.STEPS)
    assert rest == pytest.approx(curves["trained"][worker.SAVED_AFTER :], rel=1e-9)


@every_rule
@every_wrapper
def test_a_checkpoint_of_one_process_loads_on_two(folder: Path, rules: str, wrapper: str):
    _, states = found(folder, rules, wrapper)
    model = worker.converted(rules)
    worker.load(model, worker.optimizer_of(model), folder / rules)
    assert_same(states["loaded from one"], model.state_dict())


@pytest.mark.parametrize("threshold", worker.THRESHOLDS)
def test_bfloat16_copies_have_the_same_signs_and_finite_gradients(folder: Path, threshold: float | None):
    results, gradients = torch.load(folder / f"{threshold}.pt")
    torch.manual_seed(0)
    model, x = worker.single_layer(threshold)
    expected = model(x)
    assert results["trained"].dtype == torch.bfloat16
    assert torch.equal(results["trained"].float(), expected)
    assert torch.equal(results["evaluated"].float(), expected)
    expected.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert gradients[name].dtype == torch.float32
        assert_close(gradients[name], parameter.grad, rtol=0.02, atol=0.02 * parameter.grad.abs().max().item())


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
