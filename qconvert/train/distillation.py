"""`distill`: a converted network learns from the float one, beside whatever else its user's loop teaches it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, ModelError, did_you_mean
from ..example import described, refused, tensors_in
from ..modes import preserved_modes
from ..trace import unwrapped
from .calls import LastCall
from .comparisons import FEATURES, Comparison, logits_comparisons


def distill(
    student: nn.Module,
    teacher: nn.Module,
    *,
    layers: Iterable[str] = (),
    logits: str | None = "kl",
    temperature: float = 1.0,
    features: str = "match",
    logits_weight: float = 1.0,
    features_weight: float = 1.0,
    output: Callable[[Any], Any] | None = None,
) -> "Distillation":
    """Let a student learn from a teacher, at one more term in the loss.

    ::

        with qconvert.train.distill(student, teacher) as distillation:
            for x, y in loader:
                loss = criterion(student(x), y) + distillation.loss()

    Nothing of the student's forward changes: hooks note what it is called with and what comes out. ``loss()`` runs the
    teacher on the same arguments, in eval mode and without gradients, and restores its modes.

    A student in DDP's or torch.compile's wrapper is given with it, as it is called. What has been compiled and run before
    does not see the hooks on ``layers``, and from within a reentrant checkpoint their outputs come without gradients.

    Args:
        student: the model that is trained.
        teacher: the model that it is to be like, as a rule the float one that was converted.
        layers: names of modules, the same in both, whose outputs are compared too, call by call.
        logits: how outputs are compared, the mean over all floating tensors in them. Three ways, or None for not at all:
            ``"kl"``, for logits of a softmax over dim 1: Kullback-Leibler divergence from the teacher's probabilities, both
            at the temperature, times its square (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).
            ``"bce"``, for logits of a sigmoid: binary cross-entropy with the teacher's probabilities, in the same way.
            ``"mse"``: mean squared error, which the temperature does not change.
        temperature: what the logits are divided by, above 0.
        features: how the outputs of ``layers``, of shape (N, C, ...), are compared, the mean over layers. Two ways:
            ``"match"``: mean squared error in units of the teacher's variance in the channel, or of a hundredth of its mean
            over the channels, if that is more. A layer that is constant in the teacher has no unit, and counts 0.
            ``"attention"``: squared distance of the attention maps of each sample, which are sums of squares over the
            channels, brought to norm 1: 0 to 2 (Zagoruyko and Komodakis 2017, https://arxiv.org/abs/1612.03928).
        logits_weight: factor of the outputs' term, 0 or above.
        features_weight: factor of the layers' term, 0 or above.
        output: picks what is compared out of a model's output; None is all of it.

    Raises:
        InputError: if a setting is out of range.
        ModelError: if student and teacher are the same model or share a Parameter that is trained, or one of them has no
            module of a name in ``layers``.
    """
    _check_numbers(temperature=temperature, logits_weight=logits_weight, features_weight=features_weight)
    of_features = _chosen("features", features, FEATURES)
    of_logits = None if logits is None else _chosen("logits", logits, logits_comparisons(temperature))
    if isinstance(layers, str):
        raise InputError(f"layers must be a list of names, got {layers!r}: pass [{layers!r}]")
    names = tuple(dict.fromkeys(layers))
    if of_logits is None and not names:
        raise InputError("nothing to compare: give logits, or the names of some layers")
    _check_apart(student, teacher)
    for role, model in (("student", student), ("teacher", teacher)):
        _check_names(role, model, names)
    terms = [] if of_logits is None else [_Term(None, of_logits, logits_weight)]
    terms += [_Term(name, of_features, features_weight / len(names)) for name in names]
    return Distillation(student, teacher, names, terms, output or _everything)


class Distillation(AbstractContextManager["Distillation"]):
    """What `distill` returns: the loss of the student's last call, until its hooks are taken off."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        names: Sequence[str],
        terms: Sequence["_Term"],
        output: Callable[[Any], Any],
    ) -> None:
        self._teacher = teacher
        self._terms = terms
        self._hooks = ExitStack()
        self._of_student, self._of_teacher = (LastCall(model, names, output, self._hooks) for model in (student, teacher))

    def loss(self) -> Tensor:
        """Return the loss of the student's last call, a tensor of shape (), once for each call.

        Raises:
            InputError: if there was no such call, or the teacher does not run on its arguments.
            ModelError: if shapes differ from the teacher's, or there is nothing to compare.
        """
        if self._of_student.arguments is None or not self._of_student.is_complete:
            raise InputError("loss() without a call of the student since distill() or the last loss(): first y = student(x)")
        try:
            self._run_teacher(*self._of_student.arguments)
            return torch.stack([term.loss(self._of_student, self._of_teacher) for term in self._terms]).sum()
        finally:
            self._of_student.clear()
            self._of_teacher.clear()

    def close(self) -> None:
        """Take the hooks off both models."""
        self._hooks.close()
        self._of_student.clear()

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _run_teacher(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with preserved_modes(self._teacher), torch.no_grad():
            self._teacher.eval()
            try:
                self._teacher(*args, **kwargs)
            except Exception as error:
                seen = refused(self._teacher, "the student's arguments", (*args, kwargs) if kwargs else args, error)
                raise InputError(f"the teacher {seen}. It is to take what the student takes, on the same device") from error


@dataclass(frozen=True)
class _Term:
    """A term of the loss: of the layer of that name or, where it is None, of the model's output."""

    name: str | None
    comparison: Comparison
    weight: float

    def loss(self, student: LastCall, teacher: LastCall) -> Tensor:
        ours, theirs = self._tensors("student", student), self._tensors("teacher", teacher)
        if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
            seen = f"{described(theirs)} in the teacher, {described(ours)} in the student"
            raise ModelError(f"{self._where}: shapes differ: {seen}. The teacher is to be the model that was converted")
        distances = [self.comparison(*pair) for pair in zip(ours, theirs, strict=True)]
        return self.weight * torch.stack(distances).mean()

    def _tensors(self, role: str, call: LastCall) -> list[Tensor]:
        found = tensors_in(call.output if self.name is None else call.layers[self.name])
        floating = [tensor for tensor in found if tensor.is_floating_point()]
        if not floating:
            reason = "it was not reached, gives no floating tensor, or ran compiled before distill() was called"
            raise ModelError(f"{self._where}: nothing to compare in the {role}: {reason}")
        if any(tensor.dim() < len(self.comparison.shape) for tensor in floating):
            wanted = ", ".join((*self.comparison.shape, "..."))
            raise ModelError(f"{self._where}: expected tensors of shape ({wanted}), got {described(floating)} in the {role}")
        return floating

    @property
    def _where(self) -> str:
        return "the output" if self.name is None else f"layer {self.name!r}"


def _everything(output: Any) -> Any:
    return output


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        is_positive = name == "temperature"
        if not 0 <= number < math.inf or (is_positive and not number):
            raise InputError(f"{name} must be a number {'above 0' if is_positive else 'from 0 on'}, got {number!r}")


def _chosen(name: str, kind: str, known: Mapping[str, Comparison]) -> Comparison:
    if kind not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, got {kind!r}.{did_you_mean(kind, known)}")
    return known[kind]


def _check_names(role: str, model: nn.Module, names: Iterable[str]) -> None:
    known = [name for name, _ in unwrapped(model).named_modules(remove_duplicate=False)]
    for name in names:
        if name not in known:
            raise ModelError(f"the {role} has no layer {name!r}.{did_you_mean(name, known)}")


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Check that the teacher stays as it is while the student is trained."""
    if unwrapped(student) is unwrapped(teacher):
        raise ModelError("student and teacher are the same model: the teacher is the float model before its conversion")
    trained = {parameter for parameter in student.parameters() if parameter.requires_grad}
    shared = [name for name, parameter in teacher.named_parameters() if parameter in trained]
    if shared:
        raise ModelError(
            f"the teacher shares {len(shared)} trained Parameters with the student ({shared[0]} is one) and would change "
            "with it. Pass a copy: copy.deepcopy(teacher) before binarize(..., inplace=True)"
        )
