"""A tiny model of open_clip with random weights, a model that reads an image's colour, and small sets of images."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pipeline.loaders.images import ImageTransform
from pipeline.models.clip import Clip
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.tar import TarWriter

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}


@pytest.fixture(scope="session")
def clip() -> Clip:
    """Two layers, random weights."""
    torch.manual_seed(0)
    return Clip(Clip.smallest())


class ColourModel:
    """Knows that an image is of the colour it is made of; a text of the first colour word in it. A perfect model."""

    def tokenizer(self, texts: list[str]) -> Tensor:
        """The place of the first colour word; 99 for a text without one."""
        names = list(COLOURS)
        places = [[names.index(word) for word in text.rstrip(".").split() if word in names] or [99] for text in texts]
        return torch.tensor([[place[0], len(text)] for place, text in zip(places, texts, strict=True)])

    def encode_image(self, image: Tensor) -> Tensor:
        """The mean colour."""
        return functional.normalize(image.float().mean(dim=(2, 3)), dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        """The colour of the word, with a trace of the text's length."""
        colours = torch.tensor([list(colour) for colour in COLOURS.values()]).float()
        known = text[:, 0] < len(colours)
        vectors = torch.where(known[:, None], colours[text[:, 0].clamp(max=2)], torch.ones(3))
        return functional.normalize(vectors + text[:, 1:] / 100, dim=-1)

    def transforms(self, train: bool) -> ImageTransform:
        """Eight by eight."""
        return ImageTransform(size=(8, 8))


@pytest.fixture
def colour_model() -> ColourModel:
    """A perfect model of colours."""
    return ColourModel()


def image(colour: Sequence[int]) -> bytes:
    """A PNG of one colour."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((12, 16, 3), colour, dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def publish_fields(place: Path, rows: Sequence[dict[str, bytes]], card: str | None = None) -> Snapshot:
    """A snapshot in the new folder ``place``, in shards of four, of samples with these fields."""
    place.mkdir()
    shards = []
    for start in range(0, len(rows), 4):
        path = place / f"{start // 4:05d}.tar"
        with open(path, "wb") as file:
            writer = TarWriter(file)
            for number, fields in enumerate(rows[start : start + 4], start):
                writer.write(Sample(f"{number:06d}", fields))
            writer.close()
        count = len(rows[start : start + 4])
        shards.append(Shard(name=path.stem, samples=count, bytes=path.stat().st_size, sha256=file_digest(path)))
    names = tuple(sorted({field for row in rows for field in row}))
    return publish_shards(Folder(place), tuple(shards), fields=names, card=card, options={}, rows=len(rows), dropped={})


@pytest.fixture
def make_snapshot(tmp_path: Path) -> Callable[..., Snapshot]:
    """``make_snapshot(samples, card=None)``: a snapshot in shards of four of the given samples' fields."""

    def make(rows: Sequence[dict[str, bytes]], card: str | None = None, name: str = "shards") -> Snapshot:
        return publish_fields(tmp_path / name, rows, card)

    return make


@pytest.fixture
def row() -> Callable[..., dict[str, bytes]]:
    """``row("red", caption=None, **record)``: the fields of a sample in one colour, labelled with it."""
    return make_row


def make_row(colour: str, caption: str | None = None, **record: Any) -> dict[str, bytes]:
    """The fields of a sample in one colour, labelled with it."""
    described = {"label": colour, **record}
    fields = {"png": image(COLOURS[colour]), "json": json.dumps(described).encode()}
    return {**fields, "txt": (caption if caption is not None else f"a {colour} image").encode()}


@pytest.fixture
def colour_card(tmp_path: Path) -> Callable[..., str]:
    """``colour_card(count=6, **changes)``: the path of a card over a folder of images in three colours."""

    def make(count: int = 6, **changes: Any) -> str:
        for number in range(count):
            name = list(COLOURS)[number % 3]
            place = tmp_path / "images" / name
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:03d}.png").write_bytes(image(COLOURS[name]))
            (place / f"{number:03d}.txt").write_text(f"a {name} image " + "x" * number)
        card = {
            "name": "colours",
            "title": "Colours",
            "source": {"kind": "folder", "folder": str(tmp_path / "images")},
            "classes": list(COLOURS),
            "templates": ["a {} thing", "something {}"],
            **changes,
        }
        path = tmp_path / "colours.yaml"
        path.write_text(yaml.safe_dump(card))
        return str(path)

    return make
