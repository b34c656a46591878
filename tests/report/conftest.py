"""Golden texts: `pytest tests/report --overwrite-golden` renews them; read the diff before you commit it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent.parent / "golden"


def pytest_addoption(parser):
    parser.addoption("--overwrite-golden", action="store_true", help="write the golden texts instead of comparing with them")


@pytest.fixture
def golden(request) -> Callable[[str, str], None]:
    """Return a function that compares a text with the golden file of that name."""
    # the option is known only if this folder is on the command line: pytest reads options before it collects
    overwrite = request.config.getoption("--overwrite-golden", default=False)

    def check(name: str, text: str):
        path = GOLDEN / name
        if overwrite:
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more by waiting for threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
