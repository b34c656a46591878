"""Files that atheris makes, a look at the code that they reach: `load` gives a model or one ModelError.

`make fuzz`. The seed is a good file. Every second file gets the checksum that belongs to it, so that what is behind that is
reached too.
"""

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("zoo", "packed")]
with atheris.instrument_imports(include=["qconvert.packed"]):
    import torch
    from small_file import converted, fresh, parts, signed

    import qconvert
    from qconvert.errors import ModelError

FOLDER = Path(tempfile.mkdtemp(prefix="packed-fuzz-"))
PATH = FOLDER / "any.safetensors"
MODEL = fresh()


def try_file(content: bytes) -> None:
    if content[:1] != b"\0":
        with suppress(Exception):  # what has no header to sign is tried as it is
            content = signed(*parts(content))
    PATH.write_bytes(content)
    try:
        loaded = qconvert.load(PATH, MODEL)
    except ModelError:
        return
    loaded(torch.zeros(1, 2, 3, 4, 5))


if __name__ == "__main__":
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    qconvert.save(converted(), corpus / "packed")
    qconvert.save(converted(), corpus / "latent", latent=True)
    atheris.Setup([*sys.argv, "-max_len=8192", "-timeout=20", str(corpus)], try_file)
    atheris.Fuzz()
