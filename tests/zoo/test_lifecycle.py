"""What happens to a converted model besides being called: it is copied, saved, loaded, and converted again."""

import copy
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TRAPS, Entry, Residual, seeded
from small import (
    BUILDERS,
    CHANNELS,
    PLAIN,
    assert_equal,
    binary_layers,
    clip,
    convert,
    every_builder,
    every_rule,
    every_trap,
    output,
    tensors,
)
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # of reentrant checkpointing
]

ADDED = ("threshold", "spread", "scale", "offset", "step")


def is_dynamic(model: nn.Module) -> bool:
    """Whether a class of it was made by torch.nn.utils.parametrize, which pickles none of those."""
    return any(torch.nn.utils.parametrize.is_parametrized(module) for module in model.modules())


# --- copied and saved ---


@every_trap
@every_rule
def test_a_deep_copy_computes_the_same_and_shares_nothing(entry: Entry, rules: Any):
    converted = convert(entry.build().eval(), rules)
    twin = copy.deepcopy(converted)
    assert {id(t) for t in tensors(twin).values()}.isdisjoint(id(t) for t in tensors(converted).values())
    assert [type(module) for module in twin.modules()] == [type(module) for module in converted.modules()]
    assert_equal(output(twin, entry), output(converted, entry))


@every_trap
def test_a_pickle_computes_the_same(entry: Entry):
    converted = convert(entry.build().eval())
    if is_dynamic(converted):
        pytest.skip("torch pickles no parametrized module")
    twin = pickle.loads(pickle.dumps(converted))  # noqa: S301 (our own bytes)
    assert [type(module) for module in twin.modules()] == [type(module) for module in converted.modules()]
    assert_equal(output(twin, entry), output(converted, entry))


@every_trap
@every_rule
def test_a_state_dict_goes_round(entry: Entry, rules: Any):
    float_model = entry.build().eval()
    converted = convert(copy.deepcopy(float_model), rules)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.mul_(0.9).add_(0.05)  # as after training: no value is where a conversion starts it
    state = {key: value.clone() for key, value in converted.state_dict().items()}
    twin = convert(entry.build().eval(), rules)

    assert twin.load_state_dict(state, strict=True)

    assert list(twin.state_dict()) == list(state)
    assert_equal(list(twin.state_dict().values()), list(state.values()))
    added = state.keys() - float_model.state_dict().keys()
    assert {key.rpartition(".")[2] for key in added} <= set(ADDED)
    if entry.calls == 1:  # the others keep something that no state dict holds
        assert_equal(output(twin, entry), output(converted, entry))


def test_whole_models_load_in_a_fresh_process(tmp_path: Path):
    entries = [entry for entry in TRAPS if entry.calls == 1]
    entries += [Entry(name, build, clip, 0) for name, build in BUILDERS.items()]
    saved = {}
    for entry in entries:
        converted = convert(entry.build().eval())
        if not is_dynamic(converted):
            with torch.no_grad():
                expected = output(copy.deepcopy(converted), entry)
            seeded()
            saved[entry.name] = (converted, entry.inputs(), expected)
    torch.save(saved, tmp_path / "models.pt")
    script = """
import sys, torch
from torch.utils import _pytree as pytree
from models import run
for name, (model, inputs, expected) in torch.load(sys.argv[1], weights_only=False).items():
    with torch.no_grad():
        leaves = pytree.tree_leaves(run(model, inputs))
    for leaf, wanted in zip(leaves, expected, strict=True):
        assert torch.equal(leaf, wanted) if isinstance(wanted, torch.Tensor) else leaf == wanted, name
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}  # where the models' own classes are

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "models.pt")],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )

    assert done.returncode == 0, done.stderr
    assert len(saved) > 30


@every_builder
def test_copies_train_apart(build):
    converted = convert(build())
    twin = copy.deepcopy(converted)
    before = {key: value.clone() for key, value in tensors(twin).items()}
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    converted(clip()).square().mean().backward()
    optimizer.step()
    assert_equal(list(tensors(twin).values()), list(before.values()))
    assert all(parameter.grad is None for parameter in twin.parameters())


# --- converted before ---


@every_builder
@every_rule
def test_converting_twice_changes_nothing(build, rules: Any):
    once = convert(build().eval(), rules)
    twice = convert(once, PLAIN)
    assert [type(module) for module in twice.modules()] == [type(module) for module in once.modules()]
    assert_equal(list(twice.state_dict().values()), list(once.state_dict().values()))
    assert_equal([twice(clip())], [once(clip())])


def test_converting_in_two_steps_is_converting_in_one():
    model = Residual().eval()
    layers = ["blocks.0.*", "blocks.1.*"]
    whole = convert(model, {"rule": [CHANNELS["rule"][0] | {"layers": layers}]})
    halves = model
    for part in layers:
        halves = convert(halves, {"rule": [CHANNELS["rule"][0] | {"layers": part}]})
    assert binary_layers(halves) == binary_layers(whole)
    assert list(halves.state_dict()) == list(whole.state_dict())
    assert halves(clip()).shape == whole(clip()).shape


class Locked(nn.Conv3d):
    """It holds what can be neither copied nor pickled, and leaves it out of its state."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_a_subclass_keeps_its_own_way_to_be_pickled():
    converted = convert(nn.Sequential(Locked(2, 4, 3)))
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):  # noqa: S301 (our own bytes)
        assert isinstance(twin[0], Locked)
        assert binary_layers(twin) == ["0"]
        assert_equal([twin(clip())], [converted(clip())])
