"""The command line, as a user runs it: what it prints, what it writes, how it fails."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import qconvert
from qconvert import cli
from qconvert.loading import build_model

MODEL_FILE = """
import torch
from torch import nn

def net(channels=4, fail=False):
    if fail:
        raise ValueError("asked to fail")
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, channels, 3, padding=1), nn.ReLU(), nn.Conv3d(channels, 2, 3, padding=1))

def number():
    return 3

constant = 3
"""
RULES = '[model]\ninput_shape = [1, 1, 4, 4, 4]\n\n[[rule]]\nlayers = "2"\nweight = "sign"\ninput = "sign"\nreason = "try"\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(MODEL_FILE)
    (tmp_path / "rules.toml").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("nets", None)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout, stderr."""
    code = 0
    argv, sys.argv = sys.argv, ["qconvert", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = argv
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_binarize_writes_a_packed_file(folder, capsys):
    code, out, _ = run(capsys, "binarize", "nets.py:net", "-r", "rules.toml", "--packed", "q.safetensors")
    assert code == 0
    size = (folder / "q.safetensors").stat().st_size
    assert f"packed file written to q.safetensors: {size} bytes, for qconvert.load" in out
    model = build_model("nets.py:net")
    loaded, converted = qconvert.load("q.safetensors", model), qconvert.binarize(model, "rules.toml", report=False).eval()
    x = torch.randn(1, 1, 4, 4, 4)
    assert torch.equal(loaded(x), converted(x))


def test_binarize_reports_and_writes(folder, capsys):
    code, out, _ = run(
        capsys,
        "binarize",
        "nets.py:net",
        "-r",
        "rules.toml",
        "--set",
        "channels=8",
        "-o",
        "q.safetensors",
        "--report",
        "r.json",
    )
    assert code == 0
    assert out.startswith("Sequential: 2 Conv3d found, 1 converted")
    report = json.loads((folder / "r.json").read_text())
    assert [layer["decision"] for layer in report["layers"]] == ["float", "converted"]
    assert report["totals"]["after"]["bops"] == 2 * 64 * 8 * 2 * 27
    # what was written is what binarize makes in Python
    expected = qconvert.binarize(build_model("nets.py:net", {"channels": 8}), "rules.toml", report=False)
    written = safetensors.torch.load_file(folder / "q.safetensors")
    assert written.keys() == expected.state_dict().keys()
    assert all(torch.equal(written[key], value) for key, value in expected.state_dict().items())
    assert not list(folder.glob("*.partial"))


def test_a_model_file_finds_its_neighbours(folder, capsys):
    (folder / "package").mkdir()
    (folder / "package" / "blocks_beside.py").write_text(
        "from torch import nn\ndef conv():\n    return nn.Conv3d(1, 1, 1)\n"
    )
    (folder / "package" / "late.py").write_text("def net():\n    from blocks_beside import conv\n    return conv()\n")
    code, out, _ = run(capsys, "plan", "package/late.py:net", "-r", "bitorch")
    assert (code, "1 Conv3d found, 1 to convert" in out) == (0, True)


def test_weights_of_a_shared_layer_come_back(folder, capsys):
    (folder / "shared.py").write_text(
        "from torch import nn\ndef net():\n    conv = nn.Conv3d(1, 1, 1)\n    return nn.ModuleDict({'a': conv, 'b': conv})\n"
    )
    assert run(capsys, "binarize", "shared.py:net", "-r", "bitorch", "-o", "out.safetensors")[0] == 0
    assert run(capsys, "plan", "shared.py:net", "-r", "bitorch", "--checkpoint", "out.safetensors")[0] == 0


@pytest.mark.parametrize("suffix", ["html", "json", "md", "csv", "txt"])
def test_report_formats(folder, capsys, suffix):
    code, _, _ = run(capsys, "profile", "nets:net", "-i", "1,1,4,4,4", "--report", f"out.{suffix}")
    assert code == 0
    text = (folder / f"out.{suffix}").read_text()
    profile = qconvert.profile(build_model("nets:net"), torch.zeros(1, 1, 4, 4, 4))
    assert text == getattr(profile, cli._FORMATS[f".{suffix}"])()
    if suffix == "csv":
        assert [row["layer"] for row in csv.DictReader(text.splitlines())] == ["0", "2"]


def test_plan_and_rules_commands(folder, capsys):
    code, out, _ = run(capsys, "plan", "nets:net", "-r", "rules.toml")
    assert (code, out) == (0, qconvert.plan(build_model("nets:net"), "rules.toml").to_text() + "\n")
    code, out, _ = run(capsys, "rules", "list")
    assert [line.split()[0] for line in out.splitlines()] == list(qconvert.bundled_rules())
    code, out, _ = run(capsys, "rules", "show", "bitorch")
    assert out == qconvert.bundled_rules()["bitorch"].read_text()
    code, out, _ = run(capsys, "rules", "schema")
    assert json.loads(out)["title"] == "RuleFile"
    code, out, _ = run(capsys, "rules", "check", "rules.toml", "nets:net")
    assert (code, out.splitlines()[-1]) == (0, "rules.toml: 1 rules, all fine")


def test_new_rules_check_out_and_name_every_role(folder, capsys):
    code, out, _ = run(capsys, "rules", "new", "torchvision.models.video:r3d_18")
    assert code == 0
    (folder / "mine.toml").write_text(out)
    code, out, _ = run(capsys, "rules", "check", "mine.toml", "torchvision.models.video:r3d_18")
    assert code == 0
    assert "20 Conv3d found, 15 to convert" in out


@pytest.mark.parametrize("wrapping", ["plain", "state_dict", "module.", "safetensors"])
def test_checkpoints(folder, capsys, wrapping):
    state = {key: value + 1 for key, value in build_model("nets.py:net").state_dict().items()}
    path = folder / ("weights.safetensors" if wrapping == "safetensors" else "weights.pt")
    match wrapping:
        case "safetensors":
            safetensors.torch.save_file(state, path)
        case "state_dict":
            torch.save({"epoch": 3, "state_dict": state}, path)
        case "module.":
            torch.save({f"module.{key}": value for key, value in state.items()}, path)
        case _:
            torch.save(state, path)
    code, _, err = run(
        capsys, "binarize", "nets.py:net", "-r", "rules.toml", "--checkpoint", str(path), "-o", "q.safetensors"
    )
    assert (code, err) == (0, "")
    written = safetensors.torch.load_file(folder / "q.safetensors")
    assert all(torch.equal(written[key], value) for key, value in state.items())


class Unsafe:
    """Something that a checkpoint must never be able to run."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def write_bad_files(folder: Path) -> None:
    torch.save(Unsafe(), folder / "code.pt")
    torch.save(nn.Conv3d(1, 1, 1), folder / "module.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save(
        {"0.weight": torch.zeros(4, 1, 3, 3, 3), "0.bias": torch.zeros(5), "other": torch.zeros(1)}, folder / "misfit.pt"
    )
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("hello")
    (folder / "text.safetensors").write_text("hello")
    (folder / "bad.toml").write_text("[[rule]\n")
    (folder / "typo.toml").write_text('[[rule]]\nwieght = "sign"\n')
    (folder / "broken.py").write_text("def net(:\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan nets", "MODEL is package.module:callable or file.py:callable, got 'nets'"),
        ("plan nothing.here:net", "cannot import 'nothing.here': ModuleNotFoundError"),
        ("plan missing.py:net", "cannot import 'missing.py': FileNotFoundError: no file missing.py"),
        ("plan broken.py:net", "cannot import 'broken.py': SyntaxError"),
        ("plan nets:nett", "nets has no callable 'nett'. Did you mean 'net'?"),
        ("plan nets:constant", "nets has no callable 'constant'"),
        ("plan nets:number", "nets:number() returned int, not a torch.nn.Module"),
        ("plan nets:net -s fail=True", "nets:net(fail=True) raised ValueError: asked to fail"),
        ("plan nets:net -s chanels=3", "unexpected keyword argument 'chanels'"),
        ("plan nets:net -s channels", "--set takes name=value, got 'channels'"),
        ("plan nets:net -r nope", "no rule file 'nope'"),
        ("plan nets:net -r bad.toml", "bad.toml: not TOML: "),
        ("plan nets:net -r typo.toml", "typo.toml, rule 1: unknown key 'wieght'"),
        ("rules check typo.toml", "Did you mean 'weight'?"),
        ("rules show nope", "no bundled rules 'nope'"),
        ("plan torch.nn:Identity", "Identity has no Conv3d to convert"),
        ("rules new torch.nn:Identity", "Identity has no Conv3d to write rules for"),
        ("profile nets:net -i 1,2,4,4,4", "Sequential does not run on the example input (1, 2, 4, 4, 4) torch.float32"),
        ("profile nets:net -i 4,4", "does not run on the example input (4, 4)"),
        ("profile nets:net -i 1,x", "--input takes sizes and a torch dtype"),
        ("profile nets:net -i 99999999999999999999,1", "--input 99999999999999999999,1: "),
        ("profile nets:net -i 1,2:float3", "--input takes sizes and a torch dtype"),
        ("profile nets:net --report out.pdf", "out.pdf: the file's name must end in .html or .json"),
        ("profile nets:net --report nowhere/out.md", "there is no folder nowhere"),
        ("binarize nets:net -r rules.toml -o out.pt", "out.pt: the file's name must end in .safetensors"),
        ("plan nets:net --checkpoint none.pt", "no checkpoint none.pt"),
        ("plan nets:net --checkpoint code.pt", "code.pt is not a checkpoint of tensors"),
        ("plan nets:net --checkpoint module.pt", "module.pt is not a checkpoint of tensors"),
        ("plan nets:net --checkpoint list.pt", "list.pt holds no state dict: expected tensors by name, got list"),
        ("plan nets:net --checkpoint empty.pt", "empty.pt is not a checkpoint of tensors"),
        ("plan nets:net --checkpoint text.pt", "text.pt is not a checkpoint of tensors"),
        ("plan nets:net --checkpoint text.safetensors", "text.safetensors is not a checkpoint of tensors"),
        (
            "plan nets:net --checkpoint misfit.pt",
            (
                "misfit.pt does not fit Sequential: missing: 2.bias, 2.weight; unexpected: other; "
                "of another shape: 0.bias (5,) instead of (4,)"
            ),
        ),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(folder, capsys, arguments, message):
    write_bad_files(folder)
    code, out, err = run(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (folder / "pwned").exists()


def test_a_report_that_cannot_be_written(folder, capsys):
    (folder / "folder.md").mkdir()
    code, _, err = run(capsys, "profile", "nets:net", "--report", "folder.md")
    assert code == 2
    assert err.startswith("error: folder.md cannot be written: ")


def test_the_installed_command_and_its_exit_code(folder):
    command = [str(Path(sys.executable).with_name("qconvert")), "plan", "nets:net", "-r", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no rule file 'nope'")
    assert "Traceback" not in done.stderr


def test_a_failed_download_is_a_clear_error(monkeypatch, capsys):
    # the real path, without the network: what torchvision does when it cannot reach its server
    def unreachable(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    code, _, err = run(capsys, "plan", "torchvision.models.video:r3d_18", "-s", "weights=DEFAULT")
    assert code == 2
    assert "r3d_18(weights='DEFAULT') raised OSError: network is unreachable" in err
