"""Prompts with weights and stops: ``a red star:2``, ``a logo:-0.3``, ``a city:1:0.6``, ``image=sky.png:0.5``.

The form is that of VQGAN-CLIP (Crowson et al., 2022, arXiv 2204.08583): up to two numbers follow the text. A negative
weight pushes the image away. At a distance below the stop the prompt has no gradient. ``|`` separates prompts of one
image. A prompt that begins with ``image=`` is the image at a path or URI.
"""

import math
import re
from dataclasses import dataclass

from pipeline.config import require

IMAGE = "image="
NUMBER = re.compile(r":\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|-?inf|nan)\s*$")


@dataclass(frozen=True)
class WeightedPrompt:
    """One prompt of an image.

    Raises:
        SettingError: an empty text, a weight of 0, or numbers that are not finite.
    """

    text: str
    weight: float = 1.0
    stop: float = -math.inf

    def __post_init__(self) -> None:
        require(bool(self.text.removeprefix(IMAGE).strip()), "prompt", self.text, "a text, or image= and a file")
        finite = math.isfinite(self.weight) and self.weight != 0
        require(finite, "prompt", f"{self.text}:{self.weight:g}", "a weight other than 0")
        require(not math.isnan(self.stop), "prompt", f"{self.text}:{self.weight:g}:{self.stop}", "a stop")

    @property
    def image(self) -> str:
        """The path or URI of an image prompt; empty for a text."""
        return self.text.removeprefix(IMAGE).strip() if self.text.startswith(IMAGE) else ""


def parse_prompt(text: str) -> WeightedPrompt:
    """``TEXT``, ``TEXT:WEIGHT`` or ``TEXT:WEIGHT:STOP``; colons that no number follows belong to the text."""
    numbers: list[float] = []
    while len(numbers) < 2 and (found := NUMBER.search(text)):
        numbers.insert(0, float(found[1]))
        text = text[: found.start()]
    return WeightedPrompt(text.strip(), *numbers)


def parse_prompts(text: str) -> tuple[WeightedPrompt, ...]:
    """The prompts of one image, separated by ``|``; one at least has a positive weight."""
    prompts = tuple(parse_prompt(part) for part in text.split("|"))
    require(any(prompt.weight > 0 for prompt in prompts), "prompt", text, "one prompt with a positive weight")
    return prompts
