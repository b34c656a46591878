"""Speed as ratios: the contestants take turns in one process, and each round gives one ratio to the baseline."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.progress import track


@dataclass(frozen=True)
class Ratio:
    """Time of one contestant in units of the baseline's.

    Attributes:
        name: what ran.
        median, lowest, highest: over the rounds.
        seconds: its median time.
    """

    name: str
    median: float
    lowest: float
    highest: float
    seconds: float


def measure(contestants: dict[str, Callable[[], object]], rounds: int, *, warm: bool = False) -> list[Ratio]:
    """Run every contestant once per round, after one round that does not count; the first one is the baseline.

    Where it is ``warm``, each runs twice and only the second time counts, so that none pays for what another has left in the
    caches: as a model that runs again and again, code and weights are at hand.
    """
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in track(range(rounds), "rounds", transient=True):
        for name, run in contestants.items():
            if warm:
                run()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    baseline = times[next(iter(contestants))]
    return [_ratio(name, spent, baseline) for name, spent in times.items()]


def _ratio(name: str, spent: list[float], baseline: list[float]) -> Ratio:
    paired = [own / other for own, other in zip(spent, baseline, strict=True)]
    return Ratio(name, statistics.median(paired), min(paired), max(paired), statistics.median(spent))
