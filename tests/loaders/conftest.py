"""A small snapshot made by hand: coloured pictures with captions that name the colour."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from pipeline.shards.sample import Sample, sample_key
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.tar import TarWriter

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "yellow": (230, 220, 40)}

MakeSnapshot = Callable[..., Snapshot]


def picture(number: int, side: int = 72) -> bytes:
    """A noisy JPEG in the colour of ``number``."""
    noise = np.random.default_rng(number).integers(-25, 26, (side, side, 3))
    colour = list(COLOURS.values())[number % len(COLOURS)]
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality=90)
    return encoded


def sample(shard: int, index: int, number: int) -> Sample:
    """Sample ``number`` with picture, caption and json."""
    name = list(COLOURS)[number % len(COLOURS)]
    caption = f"a {'very ' * (number % 5)}{name} picture number {number}"
    described = {"label": name, "caption": caption, "number": number}
    return Sample(
        sample_key(shard, index, 100),
        {"jpg": picture(number), "txt": caption.encode(), "json": json.dumps(described).encode()},
    )


@pytest.fixture(scope="session")
def make_snapshot(tmp_path_factory: pytest.TempPathFactory) -> MakeSnapshot:
    """``make_snapshot(sizes, folder=None, spoil={number: fields})`` publishes shards of the given sizes."""

    def make(
        sizes: Sequence[int] = (7, 5, 8),
        folder: Path | None = None,
        spoil: dict[int, dict[str, bytes]] | None = None,
    ) -> Snapshot:
        place = folder or tmp_path_factory.mktemp("snapshot")
        place.mkdir(parents=True, exist_ok=True)
        shards, number = [], 0
        for shard_id, size in enumerate(sizes):
            path = place / f"{shard_id:05d}.tar"
            with open(path, "wb") as file:
                writer = TarWriter(file)
                for index in range(size):
                    made = sample(shard_id, index, number)
                    if spoil and number in spoil:
                        made = Sample(made.key, spoil[number])
                    writer.write(made)
                    number += 1
                writer.close()
            digest = file_digest(path)
            shards.append(
                Shard(name=f"{shard_id:05d}", samples=size, bytes=path.stat().st_size, sha256=digest, sidecars={})
            )
        return publish_shards(
            Folder(place),
            tuple(shards),
            fields=("jpg", "json", "txt"),
            card=None,
            options={},
            rows=sum(sizes),
            dropped={},
        )

    return make
