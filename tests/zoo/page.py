"""The page docs/zoo.md: rows of measured facts -> Markdown."""

import platform
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from qconvert.sites import Opaque

RATIO_BAR, SECONDS_BAR = 4.0, 0.1  # a conversion takes less than one of them: units of copy.deepcopy, seconds

HEADERS = (
    "model",
    "Conv3d found",
    "decided",
    "functional",
    "converted",
    "left float",
    "opaque modules",
    "forward",
    "backward",
    "identical in train()",
    "identical in eval()",
    "x deepcopy",
    "ms",
)


@dataclass(frozen=True)
class Row:
    """What was seen of one model.

    Attributes:
        name: the model's.
        found, decided: how many Conv3d modules it holds, and of how many a plan says what happens and why.
        functional: how many 3D convolutions it has beside them that are no modules.
        converted: how many of all of them the default rules convert.
        left_float: the reasons for the others, with counts.
        opaque: the modules that cannot be traced.
        forward, backward, float_backward: why that cannot be run, or nothing. The last is the float model's.
        identical_in_train, identical_in_eval: whether the identity conversion computes the same bits.
        ratio, seconds: time of a conversion, in units of copy.deepcopy and in seconds.
    """

    name: str
    found: int
    decided: int
    functional: int
    converted: int
    left_float: Counter[str]
    opaque: tuple[Opaque, ...]
    forward: str
    backward: str
    float_backward: str
    identical_in_train: bool
    identical_in_eval: bool
    ratio: float
    seconds: float

    @property
    def runs_backward(self) -> bool:
        """Whether it runs backward, or cannot because the float model cannot."""
        return not self.backward or bool(self.float_backward)

    @property
    def is_quick(self) -> bool:
        """Whether the conversion takes less than one of the bars."""
        return self.ratio < RATIO_BAR or self.seconds < SECONDS_BAR

    @property
    def good(self) -> bool:
        """Whether all is as it should be; the time is not looked at."""
        identical = self.identical_in_train and self.identical_in_eval
        return self.found == self.decided and not self.forward and self.runs_backward and identical

    @property
    def error(self) -> str:
        """What is wrong, in a word."""
        return "" if self.good else "see the table"

    @property
    def cells(self) -> tuple[str, ...]:
        """Its line of the table."""
        backward = "no, nor in float" if self.backward and self.float_backward else _yes(not self.backward)
        counts = (self.found, self.decided, self.functional, self.converted, self.left_float.total(), len(self.opaque))
        return (
            self.name,
            *map(str, counts),
            _yes(not self.forward),
            backward,
            _yes(self.identical_in_train),
            _yes(self.identical_in_eval),
            f"{self.ratio:.1f}",
            f"{1000 * self.seconds:.0f}",
        )

    @property
    def notes(self) -> list[str]:
        """What its cells have no room for."""
        notes = [f"{count} float: {_code(reason)}" for reason, count in self.left_float.most_common()]
        opaque = Counter(f"{_code(module.type)}: {_code(_brief(module.reason))}" for module in self.opaque)
        notes += [f"{count} opaque, {what}" for what, count in opaque.items()]
        if self.forward:
            notes.append(f"no forward: {_code(self.forward)}")
        if self.backward:
            whose = "the float model's error" if self.float_backward else "the converted model's only"
            notes.append(f"no backward, {whose}: {_code(self.float_backward or self.backward)}")
        return notes


@dataclass(frozen=True)
class Failure:
    """A model of which nothing was seen, and why."""

    name: str
    error: str

    @property
    def cells(self) -> tuple[str, ...]:
        """Its line of the table."""
        return (self.name, "**failed**", *[""] * (len(HEADERS) - 2))

    @property
    def notes(self) -> list[str]:
        """What its cells have no room for."""
        return [f"failed: {_code(self.error)}"]


Rows = Sequence[Row | Failure]


def page(real: Rows, traps: Rows, versions: Mapping[str, str]) -> str:
    """Return the page."""
    sections = [
        INTRODUCTION.format(ratio=RATIO_BAR, seconds=SECONDS_BAR),
        f"Python {platform.python_version()}, {', '.join(f'{name} {number}' for name, number in versions.items())}.",
        "## Totals",
        totals(real, traps),
        f"## Real models\n\n{REAL_MODELS}",
        table(real),
        f"## Traps\n\n{SMALL_MODELS}",
        table(traps),
        "## Left float, opaque, and why",
        notes([*real, *traps]),
    ]
    return "\n\n".join(sections) + "\n"


def totals(real: Rows, traps: Rows) -> str:
    """Return the table of sums, a column for each kind of model."""
    columns = [sums(real), sums(traps)]
    return _table([(name, *(column[name] for column in columns)) for name in columns[0]], ("", "real models", "traps"))


def sums(rows: Rows) -> dict[str, str]:
    """Return what is said of all models of a kind."""
    seen = [row for row in rows if isinstance(row, Row)]

    def share(holds: Callable[[Row], bool]) -> str:
        count = sum(map(holds, seen))
        return f"{count} of {len(rows)} ({100 * count / len(rows):.0f} %)" if rows else "none"

    return {
        "models": str(len(rows)),
        "Conv3d found": str(sum(row.found for row in seen)),
        "Conv3d with a decision and a reason": str(sum(row.decided for row in seen)),
        "functional 3D convolutions found": str(sum(row.functional for row in seen)),
        "3D convolutions that the default rules convert": str(sum(row.converted for row in seen)),
        "models that convert": share(lambda row: True),
        "models with an opaque module": share(lambda row: bool(row.opaque)),
        "forward runs": share(lambda row: not row.forward),
        "backward runs": share(lambda row: not row.backward),
        "backward runs, or fails in float too": share(lambda row: row.runs_backward),
        "identity conversion identical in train()": share(lambda row: row.identical_in_train),
        "identity conversion identical in eval()": share(lambda row: row.identical_in_eval),
        f"converted in {RATIO_BAR:.0f} x deepcopy or {SECONDS_BAR} s": share(lambda row: row.is_quick),
    }


def table(rows: Rows) -> str:
    """Return the rows' table."""
    return _table([row.cells for row in rows], HEADERS)


def notes(rows: Rows) -> str:
    """Return a list of what the table has no room for; nothing for a model of which there is nothing more to say."""
    return "\n".join(
        line for row in rows if row.notes for line in (f"- {row.name}", *(f"    - {note}" for note in row.notes))
    )


def _table(rows: Sequence[tuple[str, ...]], headers: tuple[str, ...]) -> str:
    align = ("left", *("right" for _ in headers[1:]))
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align if rows else None)


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"


def _brief(reason: str) -> str:
    """Shorten the reason for an opaque module: the exception without addresses, as far as one line takes it."""
    stable = re.sub(r" at 0x[0-9a-f]+", "", reason)
    return stable if len(stable) <= _BRIEF else f"{stable[:_BRIEF].rstrip()} ..."


_BRIEF = 110

INTRODUCTION = """# Zoo

What a conversion does to models of seven libraries, and to small models that hold one trap each. `make zoo` writes this
page; the tests in `tests/zoo` run on the same models and check more. Weights are random (TransNetV2's are its own), and the
architectures have fewer channels and layers than the published ones where that leaves every kind of part in.

- **Conv3d found**: modules that are an `nn.Conv3d`, subclasses included, counted without qconvert. **decided**: how many of
  them the plan has a decision and a reason for. **functional**: 3D convolutions that are no modules (`F.conv3d`), as far as
  the trace sees them. **converted**, **left float**: of both kinds together, by the rules [`default`](rules.md), with the
  reasons [below](#left-float-opaque-and-why).
- **opaque modules**: those that hold a Conv3d and that [torch.fx cannot follow](tracing.md#opaque-modules).
- **forward**, **backward**: whether the converted model runs in train mode, with the rules `default` and with `bitorch`,
  which converts every layer that can be. "no, nor in float": the float model raises there too.
- **identical**: whether a conversion with identity quantizers computes what the float model computes, bit by bit, outputs
  and buffers.
- **x deepcopy**, **ms**: time of `binarize(model, "default", report=False)`, in units of `copy.deepcopy(model)` and in
  milliseconds: medians over rounds in which both take turns, on one thread. Of all that is on this page, only these depend
  on the machine. A conversion is to take less than {ratio:.0f} x `copy.deepcopy`, or less than {seconds} s."""

REAL_MODELS = "In the order of the libraries."

SMALL_MODELS = """Most are too small for the default rules, which leave layers of fewer than 1024 weights float."""
