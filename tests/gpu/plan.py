"""The parts of a run on a GPU, their order and their time limits. Imports nothing that takes time."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A process; ``seconds`` is its limit. A part that ``measures`` time runs alone."""

    name: str
    seconds: float
    measures: bool = True


@dataclass(frozen=True)
class Setting:
    """What every part gets; ``folder`` is for files beside the results."""

    dry: bool
    folder: str
    packages: bool = False

    @property
    def device(self) -> str:
        """torch's name."""
        return "cpu" if self.dry else "cuda"


DEVICE = Part("device", 180)  # the first part waits for the imports of all
CHECK = "correctness"
CHECK_SECONDS = 100.0

# In order of importance, after the checks of the methods. Each is a function of tests/gpu/figures.py.
FIGURES = (
    Part("train_b16", 110),
    Part("train_b32", 90),
    Part("losses_32k", 45),
    Part("losses_131k", 45),
    Part("trace_b16", 50),
    Part("vild", 60),
    Part("feed", 60),
    Part("jpeg", 40),
    Part("glip", 60),
    Part("pseudo_boxes", 50),
    Part("regions", 40),
    Part("cocoop", 30),
    Part("coop", 30),
    Part("groupvit", 50),
    Part("pixel_text", 20),
    Part("blocks", 60),
)


def all_parts(methods: Sequence[str]) -> list[Part]:
    """The checks of these methods, then the figures."""
    return [*(Part(f"{CHECK}:{name}", CHECK_SECONDS, measures=False) for name in methods), *FIGURES]


def chosen(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """The parts with these names; ``correctness`` names the checks of all methods. All parts without names.

    Raises:
        ValueError: a name fits no part; those that exist are listed.
    """
    for name in names:
        if not any(name in _names(part) for part in parts):
            known = ", ".join(part.name for part in parts)
            raise ValueError(f"--parts: got {name}, expected {DEVICE.name}, {CHECK}, or some of {known}")
    return [part for part in parts if not names or any(name in _names(part) for name in names)]


def _names(part: Part) -> tuple[str, str]:
    return part.name, part.name.partition(":")[0]
