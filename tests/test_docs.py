"""The documentation is true: its code runs, the output it shows is the real one, its commands and links exist.

A page is a script. Its blocks run from top to bottom in one temporary folder, and its Python blocks share a namespace:

- a block with a title is written to the file of that name;
- ```python runs, and a ```text block right behind it is what it prints;
- ```console runs every ``$ qconvert`` and ``$ torchrun`` line, and the lines behind it are what it prints;
- ```toml that holds rules is loaded.

``...`` stands for anything, on a line of its own for any number of lines. A block behind ``<!-- not run: why -->`` is only
parsed.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from torch.distributed import run as torchrun

import qconvert
from qconvert.cli import app, main
from qconvert.pipeline import check_rules
from qconvert.quantizations import quantization_from_name, quantization_names, registry
from qconvert.tables import Model, Quantizer, Rule, RuleFile, Stage, Stages

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<not_run>[^\n]+) -->\n)?```(?P<language>\w+)(?P<options>[^\n]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)[^)]*\)")


@pytest.fixture(autouse=True)
def torch_settings():
    """One thread: small layers are no faster with more. And TransNetV2's constructor makes torch deterministic for good."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def own_quantizers(monkeypatch):
    """What a page registers is not there for the next."""
    monkeypatch.setattr(registry, "_by_name", dict(registry._by_name))


@dataclass(frozen=True)
class Block:
    """A fenced block: what it holds, and where."""

    language: str
    title: str | None
    code: str
    line: int
    runs: bool


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match["options"])
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["language"], title and title[1], match["code"], line, match["not_run"] is None))
    fences = re.findall(r"^\s*```", text, re.MULTILINE)
    assert len(fences) == 2 * len(found), f"{page.name}: a fence that this test does not see (indented, or no language)"
    return found


class Script:
    """A page as it is run."""

    def __init__(self, page: Path, capsys) -> None:
        self.page = page
        self.capsys = capsys
        self.namespace = {"__name__": "page"}
        self.printed: str | None = None

    def run(self, block: Block):
        where = f"{self.page.name}:{block.line}"
        printed, self.printed = self.printed, None
        if block.title is not None:
            Path(block.title).write_text(block.code, encoding="utf-8")
            sys.modules.pop(Path(block.title).stem, None)  # another page's file of that name
        if block.language == "toml" and re.search(r"^(\[\[rule\]\]|extends)", block.code, re.MULTILINE):
            check_rules(tomllib.loads(block.code))
        elif block.language == "text":
            assert printed is not None, f"{where}: no Python block right before it"
            assert_shown(block.code, printed, where)
        elif block.language == "console":
            for command, shown in commands_of(block):
                self._command(command, shown, where, block.runs)
        elif block.language == "python":
            # the line numbers of the page
            code = compile("\n" * (block.line - 1) + block.code, self.page.name, "exec")
            if block.runs and block.title is None:
                exec(code, self.namespace)  # noqa: S102 (the documentation's own code)
                self.printed = self.capsys.readouterr().out
        else:
            assert block.language in {"toml", "json", "yaml"}, f"{where}: nothing checks a {block.language} block"

    def _command(self, command: str, shown: str, where: str, runs: bool):
        words = shlex.split(command, comments=True)
        target = words[words.index(">") + 1] if ">" in words else None
        words = words[: words.index(">")] if target else words
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), (
                f"{where}: {command}"
            )
        elif words[0] == "qconvert":
            assert_parses(words[1:])
            if runs:
                code, out, err = self._call(words)
                assert code == 0 or "error:" in shown, f"{where}: {command} ends with {code}: {err}"
                if target:
                    Path(target).write_text(out, encoding="utf-8")
                assert_shown(shown, err if target else out + err, f"{where}: {command}")
        elif words[0] == "torchrun":
            torchrun.get_args_parser().parse_args(words[1:])
            if runs:
                done = subprocess.run(
                    [sys.executable, "-m", torchrun.__name__, *words[1:]], check=False, capture_output=True, text=True
                )
                assert done.returncode == 0, f"{where}: {command}: {done.stderr}"
                assert_shown(shown, done.stdout, f"{where}: {command}")
        else:
            assert words[0] in {"pip", "python3", "mkdocs"}, f"{where}: nothing checks {command}"

    def _call(self, words: list[str]) -> tuple[int, str, str]:
        self.capsys.readouterr()
        argv, sys.argv = sys.argv, words
        try:
            main()
        except SystemExit as end:
            out, err = self.capsys.readouterr()
            return int(end.code or 0), out, err
        finally:
            sys.argv = argv
        raise AssertionError("a command ends with an exit code")


def commands_of(block: Block) -> list[tuple[str, str]]:
    """Return the block's commands, each with the output shown behind it."""
    assert block.code.startswith("$ "), "a console block starts with a command"
    code = block.code[2:].replace("\\\n", " ")
    return [(command, shown) for command, _, shown in (part.partition("\n") for part in code.split("\n$ "))]


def assert_parses(words: list[str]):
    """Parse a command line without running it."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words, "a command is missing"
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    command.make_context("qconvert", list(words))


def assert_shown(shown: str, printed: str, where: str):
    """Check that a block shows what is printed; what it shows nothing of is not checked."""
    if not shown.strip():
        return
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else ".*?".join(map(re.escape, line.split("..."))) + r"\n"
        for line in _lines(shown)
    )
    text = "\n".join(_lines(printed)) + "\n"
    assert re.fullmatch(pattern, text), f"{where} shows\n{shown}\nbut this is printed\n{printed}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs_as_it_is_written(page: Path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    script = Script(page, capsys)
    for block in blocks_of(page):
        script.run(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_public_name_is_in_the_reference():
    reference = (DOCS / "api.md").read_text(encoding="utf-8")
    # `qconvert.trace` is documented as `qconvert.trace.trace`: read without running it, the shorter name is the module's
    listed = {entry.rpartition(".")[2] for entry in re.findall(r"^::: (qconvert\.\S+)$", reference, re.MULTILINE)}
    assert {*qconvert.__all__, *qconvert.train.__all__} - listed == set()


def test_every_quantizer_has_its_formula():
    semantics = (DOCS / "semantics.md").read_text(encoding="utf-8")
    # those of the package itself: the page registers one of its own
    names = [name for name in quantization_names() if quantization_from_name(name).__module__.startswith("qconvert.")]
    assert [name for name in names if f"| `{name}` |" not in semantics] == []


def test_every_key_of_a_rule_file_is_explained():
    rules = (DOCS / "rules.md").read_text(encoding="utf-8")
    keys = [key for table in (RuleFile, Model, Rule, Quantizer) for key in table.model_fields]
    assert [key for key in keys if f"| `{key}` |" not in rules] == []
    schedules = (DOCS / "schedules.md").read_text(encoding="utf-8")
    assert [key for table in (Stages, Stage) for key in table.model_fields if f"| `{key}` |" not in schedules] == []


def test_every_option_of_the_command_line_is_explained():
    cli = (DOCS / "cli.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands
    commands |= {f"rules {name}": command for name, command in commands.pop("rules").commands.items()}
    for name, command in commands.items():
        assert f"qconvert {name}" in cli
        for parameter in command.params:
            options = [option for option in parameter.opts if option.startswith("--")]
            assert all(f"`{option}" in cli for option in options), (name, options)


BUNDLED = re.findall(
    r"^\| `(?P<rules>[\w-]+)` \| `(?P<model>[^`]+)` \| (?P<found>\d+) \| (?P<converted>\d+) \|",
    (DOCS / "rules.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_every_bundled_rule_file_is_measured():
    assert {rules for rules, *_ in BUNDLED} == set(qconvert.bundled_rules())


@pytest.mark.parametrize(("rules", "model", "found", "converted"), BUNDLED, ids=lambda value: value.partition(" ")[0])
def test_counts_of_bundled_rules(rules: str, model: str, found: str, converted: str, capsys):
    pytest.importorskip(model.partition(".")[0].partition(":")[0])
    command = f"qconvert plan {model} --rules {rules}"
    code, out, err = Script(DOCS / "rules.md", capsys)._call(shlex.split(command))
    assert code == 0, err
    assert f"\n{found} Conv3d found, {converted} to convert.\n" in out
