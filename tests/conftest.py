"""What every test gets: a fixed seed, and hypothesis without a clock or a database.

`pytest --hypothesis-profile=long` runs 20 times as many examples, others each time.
"""

import pytest
import torch
from hypothesis import settings

# no deadline: the first call of a torch operator is slow; derandomized: a failure is the same failure on every machine
settings.register_profile("qconvert", deadline=None, derandomize=True, database=None, max_examples=50)
settings.register_profile("long", settings.get_profile("qconvert"), derandomize=False, max_examples=1000)
settings.load_profile("qconvert")


@pytest.fixture(autouse=True)
def seed():
    """Random tensors are the same in every run, whichever tests run."""
    torch.manual_seed(0)
