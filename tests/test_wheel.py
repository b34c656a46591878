"""The wheel holds what an installed package needs: the rule files, and the marker of its types."""

import subprocess
import sys
import zipfile
from pathlib import Path

import qconvert

ROOT = Path(__file__).parent.parent


def test_wheel_brings_the_rules_and_finds_them(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        assert "qconvert/py.typed" in archive.namelist()
    script = "import qconvert; print(qconvert.__file__); print(*qconvert.bundled_rules())"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "installed", capture_output=True, text=True, check=True
    )
    file, names = run.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path)  # not the checkout
    assert names.split() == list(qconvert.bundled_rules())
