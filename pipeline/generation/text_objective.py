"""An image that fits its prompts, texts or images, by the views that one or several CLIPs see."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.generation.guides import Guide
from pipeline.generation.prompts import WeightedPrompt
from pipeline.generation.similarity import cosine_distance, spherical_distance, weighted
from pipeline.generation.streams import Draw, generators
from pipeline.generation.views import Unchanged, ViewMaker, as_float
from pipeline.loaders.images import image_at

Distance = Literal["cosine", "spherical"]
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_distance,
    "spherical": spherical_distance,
}


@torch.no_grad()
def reference(guide: Guide, prompts: Sequence[WeightedPrompt]) -> Tensor:
    """What a judge compares an image of ``prompts`` with: the mean of those with positive weights, by their weights.

    A unit vector float32 [D]; raises ``SettingError`` as :class:`TextObjective`.
    """
    wanted = [prompt for prompt in prompts if prompt.weight > 0]
    vectors = torch.cat([_targets(guide, prompt, Unchanged()) * prompt.weight for prompt in wanted])
    return functional.normalize(vectors.sum(0), dim=0)


@torch.no_grad()
def _targets(guide: Guide, prompt: WeightedPrompt, views: ViewMaker) -> Tensor:
    """The vector of a text [1, D], or those of the views of an image [count, D], which depend on no seed."""
    if not prompt.image:
        return guide.texts([prompt.text])
    image = as_float(image_at(prompt.image)).to(guide.device)
    random_numbers = views.draw(generators([0], 0, Draw.PROMPTS))
    return guide.images(views.apply(image[None], random_numbers, guide.size))


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
        """``prompts`` are those of each image.

        The targets of a prompt are one vector of a text, or those of an image's views, each with an equal part of the
        weight: VQGAN-CLIP's mean over all pairs of views.

        Raises:
            SettingError: a text that a CLIP would cut, or an image that does not exist.
        """
        self.prompts, self.guides, self.views = prompts, guides, views
        self.distance, self.reduce = DISTANCES[distance], reduce
        device = guides[0].device
        rows = [(n, one, views.count if one.image else 1) for n, some in enumerate(prompts) for one in some]
        targets = [(number, one, 1 / count) for number, one, count in rows for _ in range(count)]
        self.image = torch.tensor([number for number, _, _ in targets], device=device)
        self.weights = torch.tensor([one.weight * part for _, one, part in targets], device=device)
        self.stops = torch.tensor([one.stop for _, one, _ in targets], device=device)
        every = list(dict.fromkeys(one for some in prompts for one in some))
        self.targets = []
        for guide in guides:
            vectors = {one: _targets(guide, one, views) for one in every}
            self.targets.append(torch.cat([vectors[one] for _, one, _ in rows]))

    def losses(self, images: Tensor, random: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """One for each CLIP."""
        return self._compared(images, self.views, self.views.draw(random))

    def evaluation(self, images: Tensor) -> Tensor:
        """Of the image as it is."""
        plain = Unchanged()
        found = self._compared(images, plain, plain.draw([torch.Generator()] * len(images)))
        return torch.stack(list(found.values())).sum(0)

    def references(self, guide: Guide) -> Tensor:
        """:func:`reference` of each image's prompts."""
        return torch.stack([reference(guide, some) for some in self.prompts])

    def _compared(self, images: Tensor, views: ViewMaker, random_numbers: Tensor) -> dict[str, Tensor]:
        # All CLIPs see the same views; a kind that makes them at the size of the image leaves the resizing to the CLIP.
        seen: dict[tuple[int, int], Tensor] = {}
        found = {}
        for number, (guide, targets) in enumerate(zip(self.guides, self.targets, strict=True)):
            size = guide.size if views.at_input_size else (images.shape[2], images.shape[3])
            if size not in seen:
                seen[size] = views.apply(images, random_numbers, size)
            features = guide.images(seen[size]).unflatten(0, (len(images), views.count))
            distances = self.distance(features.index_select(0, self.image), targets[:, None])
            loss = weighted(distances, self.weights, self.stops)
            per_prompt = loss.sum(1) if self.reduce == "sum" else loss.mean(1)
            total = torch.zeros(len(images), device=loss.device).index_add(0, self.image, per_prompt)
            found[f"{guide.name}#{number}"] = total
        return found
