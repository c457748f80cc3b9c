"""An image that fits its prompts, by the views that one or several CLIPs see."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.generation.guides import Guide
from pipeline.generation.prompts import WeightedPrompt
from pipeline.generation.similarity import cosine_distance, spherical_distance, weighted
from pipeline.generation.views import Unchanged, ViewMaker

Distance = Literal["cosine", "spherical"]
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_distance,
    "spherical": spherical_distance,
}


class TextObjective:
    """The weighted distances of an image's views from its prompts, summed over prompts and CLIPs.

    Views are averaged with ``reduce`` "mean" (VQGAN-CLIP) and summed with "sum" (CLIPDraw).
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[WeightedPrompt]],
        guides: Sequence[Guide],
        views: ViewMaker,
        distance: Distance = "cosine",
        reduce: Literal["mean", "sum"] = "mean",
    ) -> None:
        """``prompts`` are those of each image; raises ``SettingError`` for a text that a CLIP would cut."""
        self.prompts, self.guides, self.views = prompts, guides, views
        self.distance, self.reduce = DISTANCES[distance], reduce
        every = [prompt for some in prompts for prompt in some]
        device = guides[0].device
        self.image = torch.tensor([n for n, some in enumerate(prompts) for _ in some], device=device)
        self.weights = torch.tensor([prompt.weight for prompt in every], device=device)
        self.stops = torch.tensor([prompt.stop for prompt in every], device=device)
        self.texts = [guide.texts([prompt.text for prompt in every]) for guide in guides]

    def losses(self, images: Tensor, random: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """One for each CLIP, with its weight."""
        return self._compared(images, self.views, self.views.draw(random))

    def evaluation(self, images: Tensor) -> Tensor:
        """Of the image as it is."""
        plain = Unchanged()
        found = self._compared(images, plain, plain.draw([torch.Generator()] * len(images)))
        return torch.stack(list(found.values())).sum(0)

    def references(self, guide: Guide) -> Tensor:
        """The mean of the prompts with positive weights, by their weights."""
        found = []
        for some in self.prompts:
            wanted = [prompt for prompt in some if prompt.weight > 0]
            weights = torch.tensor([prompt.weight for prompt in wanted], device=guide.device)
            found.append((guide.texts([prompt.text for prompt in wanted]) * weights[:, None]).sum(0))
        return functional.normalize(torch.stack(found), dim=1)

    def _compared(self, images: Tensor, views: ViewMaker, drawn: Tensor) -> dict[str, Tensor]:
        # All CLIPs see the same views, at the size of the image; each resizes them to its own.
        seen = views.apply(images, drawn, (images.shape[2], images.shape[3]))
        found = {}
        for number, (guide, texts) in enumerate(zip(self.guides, self.texts, strict=True)):
            features = guide.images(seen).unflatten(0, (len(images), views.count))
            distances = self.distance(features[self.image], texts[:, None])
            loss = weighted(distances, self.weights, self.stops)
            per_prompt = loss.sum(1) if self.reduce == "sum" else loss.mean(1)
            total = torch.zeros(len(images), device=loss.device).index_add(0, self.image, per_prompt)
            found[f"{guide.name}#{number}"] = guide.weight * total
        return found
