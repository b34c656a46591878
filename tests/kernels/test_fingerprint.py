"""What numba keeps of a worker is not used once any of the sources has changed that it was compiled from."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("numba")

from qconvert.kernels.compiled import bits, convolution, fingerprint, planar, sums


@pytest.mark.parametrize(
    "source", ["compiled/memory.py", "compiled/tile.py", "compiled/vectors.py", "layout.py", "codes.py"]
)
def test_it_changes_with_every_source(source, tmp_path, monkeypatch):
    kernels = shutil.copytree(Path(fingerprint.__file__).parents[1], tmp_path / "kernels")
    number = fingerprint.fingerprint.__wrapped__
    before = number()
    monkeypatch.setattr(fingerprint, "__file__", str(kernels / "compiled" / "fingerprint.py"))
    assert number() == before
    path = kernels / source
    path.write_text(path.read_text() + "# another\n")
    assert number() != before


@pytest.mark.parametrize("module", [bits, convolution, planar, sums])
def test_it_is_a_part_of_every_workers_key(module):
    assert "of_all_sources" in module.compiled()._pyfunc.__code__.co_freevars
