"""Reconstruction of images from their codes: PSNR, SSIM, Fréchet distance, and the use of the codebook."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.evaluation.data import Data, evaluation_batches
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.fid import FidNetwork
from pipeline.evaluation.figures import image_grid
from pipeline.evaluation.reconstruction import WINDOW, FeatureMoments, frechet_distance, psnr, ssim
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task, option
from pipeline.loaders.readers import ImageReader
from pipeline.models.towers.feature_network import FeatureNetwork, check_address
from pipeline.models.towers.image_codes import ImageCodes, perplexity
from pipeline.shards.storage import split_file
from pipeline.training.checkpoint import network_address

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 6  # images of a figure


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    network: str = option(
        "",
        "reconstruction_network",
        "Network of the Fréchet distance between features of images and of reconstructions: a CLIP's run or checkpoint "
        "or ARCHITECTURE:WEIGHTS, timm:NAME, or timm:NAME:FILE with its weights; none if empty.",
    )
    fid: str = option(
        "",
        "fid_weights",
        "File of FID's Inception weights in the layout of pytorch-fid, pt_inception-2015-12-05-6726825d.pth; no FID if "
        "empty.",
    )


@dataclass(frozen=True)
class FeatureSources:
    """The networks of a set's Fréchet distances: an address, and a file of FID's weights; empty for none."""

    network: str = ""
    fid: str = ""

    def load(self) -> dict[str, FeatureNetwork | FidNetwork]:
        """The networks by the names of their metrics."""
        found: dict[str, FeatureNetwork | FidNetwork] = {}
        if self.fid:
            found["fid"] = FidNetwork(self.fid)
        if self.network:
            found[f"frechet_{slug(self.network)}"] = FeatureNetwork(self.network, "reconstruction_network")
        return found


class Reconstruction(Task):
    """Reconstructions are rounded to 8 bits, as they would be stored."""

    report = Report(
        "reconstruction",
        "reconstruction",
        (
            *(Column("psnr", "PSNR (dB)", ".2f"), Column("ssim", "SSIM", ".4f")),
            *(Column("fid", "FID", ".2f"), Column("frechet_*", format=".3f")),
            *(Column("codebook_usage", "codes used"), Column("codebook_perplexity", "perplexity", ",.1f")),
            SAMPLES,
        ),
    )
    help = "Sets of images for a model of image codes, such as a VQGAN; see --zero-shot."
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require image codes, and images that SSIM can compare."""
        codes = isinstance(model, ImageCodes) and hasattr(model, "transforms")
        require(codes, "checkpoint", type(model).__name__, "a model that reconstructs images, such as a VQGAN")
        size = _reader(model).transform.size  # type: ignore[union-attr]
        require(min(size) >= WINDOW, "image_size", size, f"{WINDOW} pixels or more, which SSIM needs")

    def prepare(self, config: Config, data: Data, name: str) -> FeatureSources:
        """The feature networks."""
        address = network_address(config.network)
        if address:
            check_address(address, "reconstruction_network")
        if config.fid:
            folder, file = split_file(config.fid)
            require(folder.exists(file), "fid_weights", config.fid, "a file that exists")
        return FeatureSources(address, config.fid)

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Means over images; use and perplexity of the codes of all of them."""
        readers = [_reader(model)]
        batches = evaluation_batches(one.samples(), readers, reading.evaluation_batch, reading.evaluation_threads)
        scores: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
        networks = one.ready.load()
        moments = {name: (FeatureMoments(), FeatureMoments()) for name in networks}
        counts = torch.zeros(len(model.codebook), dtype=torch.float64)
        with inference(model, reading.evaluation_precision) as device:
            for batch in batches:
                images = batch["image"].to(device).float() / 255
                made, numbers = reconstructed(model, images)
                counts += torch.bincount(numbers.flatten().cpu(), minlength=len(counts))
                for name, score in (("psnr", psnr), ("ssim", ssim)):
                    scores[name].append(score(images, made).cpu())
                for name, network in networks.items():
                    for some, found in zip((images, made), moments[name], strict=True):
                        found.add(network.to(device).vectors(some))
        metrics = {name: float(torch.cat(parts).mean()) for name, parts in scores.items()}
        metrics |= {name: frechet_distance(*pair) for name, pair in moments.items()}
        metrics["codebook_usage"] = float((counts > 0).double().mean())
        metrics["codebook_perplexity"] = float(perplexity(counts))
        return {**metrics, "samples": float(len(torch.cat(scores["psnr"])))}

    def figures(self, model: Any, one: PreparedSet, title: str) -> dict[str, "Figure"]:
        """``reconstructions``: six images, each beside its reconstruction."""
        batch = next(evaluation_batches(one.samples(SHOWN), [_reader(model)], SHOWN, 1))
        with inference(model) as device:
            images = batch["image"].to(device).float() / 255
            found, _ = reconstructed(model, images)
            nearness = psnr(images, found).tolist()
        shown = [(255 * image).round().byte().cpu() for pair in zip(images, found, strict=True) for image in pair]
        captions = [text for value in nearness for text in ("image", f"reconstruction, {value:.1f} dB")]
        title = f"{one.name} {title}".strip() + ": reconstructions"
        return {"reconstructions": image_grid(shown, captions, title=title)}


def reconstructed(model: ImageCodes, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images float [N, 3, H, W] from 0 to 1 to reconstructions in steps of 1/255, and their codes int64 [N, h, w]."""
    codes, numbers = model.quantise(model.encode(images))
    return (model.decode(codes).float().clamp(0, 1) * 255).round() / 255, numbers


def slug(address: str) -> str:
    """The part of a metric's name that says which network: ``timm-vgg16.tv_in1k`` of ``timm:vgg16.tv_in1k:FILE``."""
    parts = address.split(":")
    kept = parts[: 1 + (parts[0] == "timm")] if "/" in parts[-1] else parts
    return re.sub(r"[^\w.]+", "-", "-".join(kept)).strip("-")


def _reader(model: Any) -> ImageReader:
    return ImageReader(transform=model.transforms(train=False))
