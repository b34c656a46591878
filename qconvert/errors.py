"""The errors that qconvert raises on purpose, and how a suggestion and the error of another are worded.

Every message says what went wrong, where, what was seen, and what to do about it.
"""

import difflib
from collections.abc import Iterable


class QConvertError(Exception):
    """Base of every error that qconvert raises on purpose."""


class RuleError(QConvertError, ValueError):
    """A rule file cannot be read, or a rule in it selects nothing or asks for something impossible."""


class QuantizerError(QConvertError, ValueError):
    """A quantizer of that name does not exist, or does not take these settings."""


class ModelError(QConvertError, ValueError):
    """The model cannot be converted, loaded or built."""


class InputError(QConvertError, ValueError):
    """What comes in cannot be used: a model does not run on it, there is none of it, it is not finite or out of range."""


def did_you_mean(seen: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the name nearest to ``seen``, or ``""`` where none is near."""
    nearest = difflib.get_close_matches(seen, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def first_line(error: BaseException) -> str:
    """Return type and first line of an error."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}".rstrip(".: ")


class ConstantInputWarning(UserWarning):
    """A converted layer's quantized input is the same everywhere: the layer learns nothing and passes nothing on."""


CONSTANT_MENDED_BY = 'Mend it in the rule that converts them: input = { quantizer = "...", threshold = "auto" }.'
CONSTANT_MEASURED_BY = "Where the rule has that, the graph tells where thresholds start: measure it, by calibration_data."
CONSTANT_IN_DATA = "Where the rule has that, their input is constant in calibration_data: pass more batches, or others."
