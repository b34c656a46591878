"""`distill`: its terms against formulas written out in numpy, and both models as they were."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import (
    CheckpointedByHooks,
    Clip,
    DataclassInDataclassOut,
    DictInDictOut,
    KeywordOnly,
    MutatedInputs,
    SharedModule,
)
from small import clip, convert
from torch import Tensor, nn

from qconvert import InputError, ModelError
from qconvert.train import distill


class Classifier(nn.Module):
    """5 classes for each clip, a block that overwrites what it is given, and dropout."""

    def __init__(self, classes: int = 5):
        super().__init__()
        self.first = nn.Conv3d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm3d(3)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Conv3d(3, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.relu(self.norm(self.first(x))))).mean((2, 3, 4))


def pair(build: Callable[[], nn.Module] = Classifier) -> tuple[nn.Module, nn.Module]:
    """Return a student and its teacher, both in training mode."""
    teacher = build().train()
    return convert(teacher).train(), teacher


def alone(loss: Tensor) -> float:
    assert loss.shape == ()
    assert loss.requires_grad
    return loss.item()


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return temperature**2 * (p * np.log(p / q)).sum(1).mean()


def bce(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    p, q = (1 / (1 + np.exp(-logits / temperature)) for logits in (teacher, student))
    return -(temperature**2) * (p * np.log(q) + (1 - p) * np.log(1 - q)).mean()


def mse(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    return ((student - teacher) ** 2).mean()


def match(student: np.ndarray, teacher: np.ndarray) -> float:
    """Channel after channel."""
    variances = [teacher[:, c].var() for c in range(teacher.shape[1])]
    units = [max(variance, np.mean(variances) / 100) for variance in variances]
    errors = [((student[:, c] - teacher[:, c]) ** 2).mean() for c in range(teacher.shape[1])]
    return float(np.mean([error / unit for error, unit in zip(errors, units, strict=True)]))


def attention(student: np.ndarray, teacher: np.ndarray) -> float:
    """Sample after sample."""
    distances = []
    for sample in zip(student, teacher, strict=True):
        ours, theirs = ((features**2).sum(0).ravel() for features in sample)
        distances.append(((ours / np.linalg.norm(ours) - theirs / np.linalg.norm(theirs)) ** 2).sum())
    return float(np.mean(distances))


def close_to(number: float) -> Any:
    """Compare with what float32 leaves of a difference of logits."""
    return pytest.approx(number, rel=1e-5, abs=1e-6)


def in_eval(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


# --- the terms ---


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("logits", "formula"), [("kl", kl), ("bce", bce), ("mse", mse)])
def test_logits(logits: str, formula: Callable[..., float], temperature: float):
    student, teacher = pair()
    expected = in_eval(teacher, clip())
    with distill(student, teacher, logits=logits, temperature=temperature, logits_weight=0.5) as distillation:
        y = student(clip())
        assert alone(distillation.loss()) == close_to(0.5 * formula(array(y), array(expected), temperature))


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 3, 2, 2, 2)], ids=str)
def test_softmax_is_over_dim_1(shape: tuple[int, ...]):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * x

    student, x = Scaled(), torch.randn(shape)
    with distill(student, nn.Identity()) as distillation:
        y = student(x)
        assert alone(distillation.loss()) == close_to(kl(array(y), array(x), 1.0))


@pytest.mark.parametrize("layer", ["first", "norm", "relu"])
@pytest.mark.parametrize(("features", "formula"), [("match", match), ("attention", attention)])
def test_features(features: str, formula: Callable[..., float], layer: str):
    student, teacher = pair()
    seen: dict[str, Tensor] = {}
    for role, model in (("student", student), ("teacher", teacher)):
        model.get_submodule(layer).register_forward_hook(lambda _m, _x, y, role=role: seen.update({role: y.clone()}))
    with distill(student, teacher, layers=[layer], logits=None, features=features, features_weight=3) as distillation:
        student(clip())
        loss = alone(distillation.loss())
    assert loss == pytest.approx(3 * formula(array(seen["student"]), array(seen["teacher"])), rel=1e-4)


def test_both_terms_and_several_layers_add_up():
    student, teacher = pair()
    losses = {}
    for names, logits in ((["first"], None), (["norm"], None), ([], "kl"), (["first", "norm", "first"], "kl")):
        torch.manual_seed(0)
        with distill(student, teacher, layers=names, logits=logits, logits_weight=2, features_weight=5) as distillation:
            student(clip())
            losses[*names, logits] = alone(distillation.loss())
    mean = (losses["first", None] + losses["norm", None]) / 2
    assert losses["first", "norm", "first", "kl"] == pytest.approx(mean + losses[("kl",)], rel=1e-6)


def test_a_layer_that_is_called_several_times_counts_each_call():
    student, teacher = pair(SharedModule)
    outputs: dict[str, list[np.ndarray]] = {"student": [], "teacher": []}
    for role, model in (("student", student), ("teacher", teacher)):
        model.conv.register_forward_hook(lambda _m, _x, y, role=role: outputs[role].append(array(y)))
    with distill(student, teacher, layers=["same"], logits=None) as distillation:
        student(clip())
        loss = alone(distillation.loss())
    assert len(outputs["student"]) == 2
    assert loss == pytest.approx(np.mean([match(*calls) for calls in zip(*outputs.values(), strict=True)]), rel=1e-4)


def test_channels_that_are_constant_in_the_teacher():
    x = torch.randn(2, 3, 4, 5)
    teacher = nn.BatchNorm2d(3)
    with torch.no_grad():
        teacher.weight.copy_(torch.tensor([0.0, 1.0, 1.0]))
    student = nn.Conv2d(3, 3, 1)
    with distill(student, nn.Sequential(teacher), layers=[""], logits=None) as distillation:
        y = student(x)
        assert alone(distillation.loss()) == pytest.approx(match(array(y), array(in_eval(teacher, x))), rel=1e-4)
    nn.init.zeros_(teacher.weight)
    with distill(student, nn.Sequential(teacher), layers=[""], logits=None) as distillation:
        student(x)
        loss = distillation.loss()
    loss.backward()
    assert loss.item() == 0
    assert student.weight.grad.isfinite().all()


def test_gradients_reach_the_student_only():
    student, teacher = pair()
    before = copy.deepcopy(teacher.state_dict())
    teacher.norm.eval()
    modes = [module.training for module in teacher.modules()]
    with distill(student, teacher, layers=["first", "norm"]) as distillation:
        student(clip())
        distillation.loss().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())
    assert [module.training for module in teacher.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_a_copy_of_the_teacher_is_perfect():
    teacher = Classifier().eval()
    student = copy.deepcopy(teacher)
    for settings in ({"logits": "kl"}, {"logits": "mse"}, {"features": "attention"}):
        with distill(student, teacher, layers=["first", "norm", "relu"], **settings) as distillation:
            student(clip())
            assert distillation.loss().item() == pytest.approx(0, abs=1e-6)


# --- any model, any call ---


@pytest.mark.parametrize(
    ("build", "call"),
    [
        (DictInDictOut, lambda model: model({"clip": clip(), "gain": 2.0})),
        (KeywordOnly, lambda model: model(clip=clip(), bias=torch.ones(()))),
        (MutatedInputs, lambda model: model([clip(), clip() + 1])),
        (DataclassInDataclassOut, lambda model: model(Clip(clip(), gain=0.5))),
    ],
    ids=["dict", "keywords", "overwritten inputs", "dataclass"],
)
def test_any_arguments_and_outputs(build: type[nn.Module], call: Callable[[nn.Module], Any]):
    teacher = build()
    student = copy.deepcopy(teacher)
    with distill(student, teacher, logits="mse") as distillation:
        call(student)
        assert alone(distillation.loss()) == 0
        with torch.no_grad():
            next(student.parameters()).add_(1)
        call(student)
        assert alone(distillation.loss()) > 0


def test_output_picks_what_is_compared():
    student, teacher = pair(DictInDictOut)
    batch = {"clip": clip()}
    expected = array(in_eval(teacher, batch)["maps"][0])
    with distill(student, teacher, logits="mse", output=lambda y: y["maps"][0]) as distillation:
        y = student(batch)
        assert alone(distillation.loss()) == pytest.approx(mse(array(y["maps"][0]), expected, 1), rel=1e-5)


def test_a_change_of_the_output_in_place_comes_too_late():
    student, teacher = pair()
    expected = array(in_eval(teacher, clip()))
    with distill(student, teacher) as distillation:
        y = student(clip())
        logits = array(y)
        y.mul_(100)
        assert alone(distillation.loss()) == close_to(kl(logits, expected, 1))


def test_checkpointed_layers_are_seen_once():
    student, teacher = pair(CheckpointedByHooks)
    with distill(student, teacher, layers=["block.0"], logits=None) as distillation:
        student(clip())
        loss = distillation.loss()
        loss.backward()
        assert student.block[0].weight.grad.abs().sum() > 0
        assert distillation._of_student.layers == {"block.0": []}
        student(clip())
        assert torch.equal(distillation.loss(), loss)


def test_under_autocast():
    student, teacher = pair()
    student.drop.p = 0.0
    with distill(student, teacher, layers=["norm"]) as distillation:
        student(clip())
        expected = distillation.loss().item()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            student(clip())
            inside = distillation.loss()
            student(clip())
        outside = distillation.loss()
    for loss in (inside, outside):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=0.1)
        loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_of_a_compiled_student(wrapped_first: bool):
    student, teacher = pair()
    student.drop.p = 0.0
    with distill(student, teacher, layers=["norm"]) as distillation:
        student(clip())
        expected = distillation.loss().item()
    compiled = torch.compile(student, backend="aot_eager")
    with distill(compiled if wrapped_first else student, teacher, layers=["norm"]) as distillation:
        for _ in range(2):
            compiled(clip())
            loss = distillation.loss()
            assert loss.item() == pytest.approx(expected, rel=1e-4)
            loss.backward()


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_of_a_student_in_ddp(wrapped_first: bool):
    student, teacher = pair()
    student.drop.p = 0.0
    twin = copy.deepcopy(student)
    with distill(twin, teacher, layers=["norm"]) as distillation:
        twin(clip())
        expected = distillation.loss()
        expected.backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(student)
        with distill(wrapped if wrapped_first else student, teacher, layers=["norm"]) as distillation:
            wrapped(clip())
            loss = distillation.loss()
            loss.backward()
    finally:
        dist.destroy_process_group()
    assert torch.equal(loss, expected)
    for (name, parameter), other in zip(student.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


# --- an object's life ---


def test_hooks_are_taken_off():
    student, teacher = pair()
    with distill(student, teacher, layers=["first"]) as distillation:
        student(clip())
    other = distill(student, teacher, layers=["first"])
    other.close()
    for model in (student, teacher):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match=r"^loss\(\) without a call of the student since"):
        distillation.loss()


def test_loss_is_of_one_call():
    student, teacher = pair()
    distillation = distill(student, teacher)
    with pytest.raises(InputError, match=r"^loss\(\) without a call of the student since .*: first y = student\(x\)"):
        distillation.loss()
    student(clip())
    distillation.loss()
    with pytest.raises(InputError, match=r"^loss\(\) without a call"):
        distillation.loss()
    student(clip())
    with pytest.raises(RuntimeError):
        student(clip()[:, [0, 1, 0]])
    with pytest.raises(InputError, match=r"^loss\(\) without a call"):
        distillation.loss()


def test_the_student_can_be_copied_and_copies_hold_no_teacher():
    student, teacher = pair()
    with distill(student, teacher) as distillation:
        student(clip())
        distillation.loss()
        twin = copy.deepcopy(student)
        student(clip())
        expected = distillation.loss().item()
        student(clip())
        twin(clip())
        assert math.isfinite(expected)
        assert alone(distillation.loss()) >= 0
    (hook,) = twin._forward_hooks.values()
    assert teacher not in vars(hook.__self__).values()


# --- refusals ---


def small(name: str) -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 3, 1), getattr(nn, name)())


SETTINGS = {
    "logits": ({"logits": "kk"}, r"^logits must be one of kl, bce, mse, got 'kk'"),
    "features": (
        {"features": "atention"},
        r"^features must be one of match, attention, got 'atention'.* mean 'attention'\?",
    ),
    "temperature": ({"temperature": 0}, r"^temperature must be a number above 0, got 0"),
    "nan": ({"temperature": math.nan}, r"^temperature must be a number above 0, got nan"),
    "logits weight": ({"logits_weight": -1}, r"^logits_weight must be a number from 0 on, got -1"),
    "features weight": ({"features_weight": math.inf}, r"^features_weight must be a number from 0 on, got inf"),
    "a name": ({"layers": "first"}, r"^layers must be a list of names, got 'first': pass \['first'\]"),
    "nothing": ({"logits": None}, r"^nothing to compare: give logits, or the names of some layers"),
}


@pytest.mark.parametrize(("settings", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_out_of_range(settings: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        distill(*pair(), **settings)


def test_an_unknown_layer():
    student, teacher = pair()
    with pytest.raises(ModelError, match=r"^the student has no layer 'frist'\. Did you mean 'first'\?$"):
        distill(student, teacher, layers=["norm", "frist"])
    with pytest.raises(ModelError, match=r"^the teacher has no layer 'norm'\."):
        distill(student, nn.Sequential(nn.Conv3d(2, 5, 1)), layers=["norm"])
    assert not student.norm._forward_hooks


def test_a_teacher_of_another_shape():
    student, _ = pair()
    with distill(student, Classifier(7), layers=["first"]) as distillation:
        student(clip())
        seen = r"\[\(2, 7\) torch.float32\] in the teacher, \[\(2, 5\) torch.float32\] in the student"
        with pytest.raises(ModelError, match=rf"^the output: shapes differ: {seen}\. The teacher is to be"):
            distillation.loss()
    with distill(student, Classifier(7), layers=["first", "second"], logits=None) as distillation:
        student(clip())
        with pytest.raises(ModelError, match=r"^layer 'second': shapes differ: \[\(2, 7, 4, 6, 6\).* \[\(2, 5, 4, 6, 6\)"):
            distillation.loss()


def test_a_teacher_that_calls_a_layer_less_often():
    class Once(SharedModule):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    student, _ = pair(SharedModule)
    with distill(student, Once(), layers=["conv"]) as distillation:
        student(clip())
        with pytest.raises(
            ModelError, match=r"^layer 'conv': shapes differ: \[\(2, 2, 4, 6, 6\) torch.float32\] in the teac"
        ):
            distillation.loss()


def test_a_teacher_that_does_not_run():
    student, _ = pair()
    with distill(student, nn.Linear(3, 3)) as distillation:
        student(clip())
        message = (
            r"^the teacher Linear does not run on the student's arguments \(2, 2, 4, 6, 6\) torch.float32: RuntimeError: .*"
        )
        with pytest.raises(InputError, match=message):
            distillation.loss()


def test_a_layer_that_is_not_reached():
    student, teacher = pair()
    student.spare = teacher.spare = nn.ReLU()
    with distill(student, teacher, layers=["spare"]) as distillation:
        student(clip())
        with pytest.raises(ModelError, match=r"^layer 'spare': nothing to compare in the student: it was not reached"):
            distillation.loss()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, r"the output: expected tensors of shape \(N, classes, \.\.\.\)"),
        ({"logits": None, "layers": [""]}, r"layer '': .*C"),
    ],
)
def test_too_few_dimensions(settings: dict[str, Any], wanted: str):
    student, teacher = pair(lambda: nn.Sequential(nn.Conv3d(2, 3, 1), nn.Flatten(0)))
    with distill(student, teacher, **settings) as distillation:
        student(clip())
        with pytest.raises(ModelError, match=rf"^{wanted}.*, got \[\(864,\) torch.float32\] in the student"):
            distillation.loss()


def test_a_teacher_that_trains_along():
    student, teacher = pair()
    for model in (student, torch.compile(student)):
        with pytest.raises(ModelError, match=r"^student and teacher are the same model"):
            distill(model, student)
    teacher.first.weight = student.first.weight
    with pytest.raises(
        ModelError, match=r"^the teacher shares 1 trained Parameters with the student \(first.weight is one\)"
    ):
        distill(student, teacher)
    with pytest.raises(ModelError, match=r"^the teacher shares \d+ trained Parameters"):
        distill(student, nn.Sequential(student))
    student.first.weight.requires_grad_(requires_grad=False)
    distill(student, teacher).close()
