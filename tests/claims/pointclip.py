"""PointCLIP on drawn solids: more views, few-shot adaptation, and its ensemble with a point network.

Zhang et al. 2021, arXiv 2112.02413. A CLIP of drawn images has never seen depth, and needs no weights from elsewhere
here; so a small CLIP is trained half on drawn scenes, half on images and captions of single views of other clouds of
the 12 base solids. Zero-shot classification is among the base solids. Few-shot adaptation and the point network, a
PointNet (Qi et al. 2017) without its transforms, are for all 16 solids; no caption names four of these. The network is
trained on 25 clouds of each, the adapter on 16. The weight of the ensemble is the best on validation clouds.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from claim import Claim, drawn, named, run

VIEWS, SCENES, EPOCHS, SIZE = 5_000, 5_000, 6, 64
TRAINED, TESTED, POINTS = 400, 800, 512
NETWORK_EPOCHS, SHOTS = 40, 16
PIXELS = "pixels=image"
ONE_VIEW = "1+0+0+0+0+0"
FOUR_SIDES = "1+1+1+1+0+0"


def measure(seed: int, folder: Path) -> dict[str, float]:
    """Accuracies by the names that ``CLAIMS`` compare."""
    from pipeline.evaluation.models import load_model
    from pipeline.evaluation.suite import Evaluations, evaluate

    output = folder / f"clip-{seed}"
    data = f"{_views(folder / 'views')}=0.5,{drawn(folder / 'scenes', SCENES)}=0.5"
    how = ("--epochs", EPOCHS, "--workers", 0, "--loader-workers", 1, "--seed", seed)
    run("pretrain_clip", "demo", "--data", data, "--output-folder", output, *how, *_store(folder))
    base = _base_card(folder)
    sets = [
        f"{name}={base},medium=points,{PIXELS},view_weights={weights}"
        for name, weights in (("one_view", ONE_VIEW), ("four_views", FOUR_SIDES), ("six_views", "equal"))
    ]
    found = evaluate(load_model(str(output), "cpu"), Evaluations(zero_shot=tuple(sets)).prepare())
    metrics = {name: found[f"zeroshot/{name}/top1"] for name in ("one_view", "four_views", "six_views")}
    scores, metrics["network"] = _network(seed, folder)
    adapted = folder / f"adapted-{seed}"
    few = ("--methods", "zero_shot", "pointclip", "--data", "drawn_solids", "--shots", SHOTS, "--seeds", seed + 1)
    where = ("--output", adapted, "--processes-count", 0, "--no-track", "--no-keep-adapters")
    clouds = ("--pixels", "image", "--samples", TESTED, "--validation", "whole")
    run("adapt", "few-shot", "--model", output, *few, *where, *clouds)
    both = ("--output", folder / f"ensemble-{seed}", "--ensemble", scores, *where[2:])
    run("adapt", "few-shot", "--model", output, *few[:1], "pointclip", *few[3:], *both, *clouds)
    metrics |= _read(adapted / "table.csv", {"zero_shot": "zero_shot", "pointclip": "adapted"})
    return metrics | _read(folder / f"ensemble-{seed}/table.csv", {"pointclip + ensemble": "ensemble"})


def _store(folder: Path) -> tuple[str, str]:
    return "--tracking-uri", f"sqlite:///{folder}/mlflow.db"


def _views(folder: Path) -> Path:
    """A snapshot of single views of solids as images with captions."""
    import io

    import numpy as np
    import torch
    from PIL import Image

    from pipeline.codecs.point_views import centred
    from pipeline.evaluation.point_clip import CloudViews
    from pipeline.sources.drawn.solids import draw_solid

    shards, files = folder / "shards", folder / "images"
    if shards.exists():
        return shards
    files.mkdir(parents=True, exist_ok=True)
    seen, flat = CloudViews(projection="few_shot", pixels="image"), torch.zeros(1, 3, 1, 1)
    for number in range(VIEWS):
        solid = draw_solid("train", 1, number, 1024)
        points = torch.from_numpy(np.load(io.BytesIO(solid.points)))
        images = seen.images(centred(points[None]), None, (SIZE, SIZE), flat, flat)[0]
        image = images[number % len(images)].round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(image).save(files / f"{number:06d}.png")
        (files / f"{number:06d}.txt").write_text(solid.caption)
    words = ("--folder", files, "--output-folder", shards, "--processes-count", 0, "--number-sample-per-shard", 1000)
    run("refresh_dataset", "folder", *words)
    return shards


def _base_card(folder: Path) -> Path:
    """A card of clouds of the base solids."""
    import yaml

    from pipeline.sources.drawn.solids import BASE_SOLIDS

    card = {
        "name": "base_solids",
        "title": "Drawn, 12 solids",
        "source": {"kind": "drawn", "points": True, "split": "val", "samples": TESTED},
        "classes": list(BASE_SOLIDS),
        "templates": ["a depth map of a {}."],
    }
    (folder / "base_solids.yaml").write_text(yaml.safe_dump(card))
    return folder / "base_solids.yaml"


def _network(seed: int, folder: Path) -> tuple[Path, float]:
    """A file of the scores of a trained PointNet on validation and test clouds, and its accuracy on the test."""
    import torch
    from torch import nn
    from torch.nn import functional

    from pipeline.evaluation.ensemble import scores_file
    from pipeline.sources.drawn.solids import SOLIDS

    class PointNet(nn.Module):
        """Each point by itself, then the maximum over points."""

        def __init__(self) -> None:
            super().__init__()
            widths = (3, 64, 128, 512)
            layers = [
                layer
                for before, after in zip(widths, widths[1:], strict=False)
                for layer in (nn.Conv1d(before, after, 1), nn.BatchNorm1d(after), nn.ReLU())
            ]
            self.points = nn.Sequential(*layers)
            self.head = nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, len(SOLIDS)))

        def forward(self, points: torch.Tensor) -> torch.Tensor:
            return self.head(self.points(points.transpose(1, 2)).amax(dim=2))

    torch.manual_seed(seed)
    network = PointNet()
    train, _, labels = _clouds("solids_train", 0, TRAINED)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NETWORK_EPOCHS)
    for _ in range(NETWORK_EPOCHS):
        for rows in torch.randperm(len(train)).split(32):
            angle = 2 * torch.pi * torch.rand(len(rows))
            turned = _turned(train[rows], angle) + 0.01 * torch.randn(len(rows), train.shape[1], 3)
            loss = functional.cross_entropy(network(turned), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    network.eval()
    parts = [_clouds("solids_train", 1_000_000, TESTED), _clouds("solids", 0, TESTED)]
    with torch.no_grad():
        logits = [torch.cat([network(part) for part in clouds.split(100)]) for clouds, _, _ in parts]
    keys = [key for _, names, _ in parts for key in names]
    file = folder / f"network-{seed}.parquet"
    file.write_bytes(scores_file(keys, SOLIDS, torch.cat(logits)))
    return file, float((logits[1].argmax(dim=1) == parts[1][2]).float().mean())


def _turned(points, angle):  # noqa: ANN001, ANN202
    """Clouds turned about the vertical."""
    import torch

    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
    x, y, z = points.unbind(dim=2)
    return torch.stack([cosine * x + sine * z, y, cosine * z - sine * x], dim=2)


def _clouds(split: str, first: int, count: int) -> tuple["object", Sequence[str], "object"]:
    """Clouds in the unit ball, float [N, P, 3], their keys, and their labels."""
    import io

    import numpy as np
    import torch

    from pipeline.codecs.point_views import centred
    from pipeline.sources.drawn.solids import SOLIDS, draw_solid, solid_class

    numbers = range(first, first + count)
    arrays = [np.load(io.BytesIO(draw_solid(split, 0, number, 1024).points))[:POINTS] for number in numbers]
    labels = torch.tensor([SOLIDS.index(solid_class(split, number)) for number in numbers])
    return centred(torch.from_numpy(np.stack(arrays))), [f"drawn://{split}/0/{number}" for number in numbers], labels


def _read(file: Path, methods: dict[str, str]) -> dict[str, float]:
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    return {methods[row["method"]]: float(row["top1_mean"]) for row in rows if row["method"] in methods}


CLAIMS = (
    Claim("more views help: four sides over one", named("one_view"), named("four_views")),
    Claim("… six views over four sides", named("four_views"), named("six_views")),
    Claim(f"{SHOTS} shots with the inter-view adapter help", named("zero_shot"), named("adapted")),
    Claim("the ensemble beats the point network", named("network"), named("ensemble")),
    Claim("… and PointCLIP alone", named("adapted"), named("ensemble")),
)
