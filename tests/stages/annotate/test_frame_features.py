"""Features of frames as a sidecar: each video's own frames in order, at most once, of any length, by any batch size."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import DataError, SettingError, SidecarError
from pipeline.evaluation.frame_embedder import PART, FrameEmbedder, FrameRate
from pipeline.loaders.batches import LoaderConfig, snapshot_batches
from pipeline.loaders.frames import FrameFeatureReader, FrameSampling
from pipeline.models.clip import Clip
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import read_sidecar_schema, sidecar_facts
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards, read_snapshot
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.tar import TarWriter
from pipeline.shards.video_frames import Timeline, read_frames
from pipeline.stages.annotate.embeddings import EmbedOptions
from pipeline.stages.annotate.frame_features import DecodedFrames, embed_frames, read_frame_features
from pipeline.stages.shard_tasks import Workers
from tests.videos import encoded_video, numbered, numbers_of

HERE = Workers(processes_count=0)
LENGTHS = (12, 300, 5, 41)  # frames at 10 a second


@dataclass
class Numbers:
    """A model whose features are the numbers that the frames show, times ``scale``; three frames are a part."""

    maker: str = "numbers"
    scale: float = 1.0
    batches: list[int] = field(default_factory=list)
    facts: Any = field(default_factory=lambda: {"teacher": "t", "width": 2, "frames_per_second": 2.0})

    def decode(self, sample: Sample, part: int) -> DecodedFrames | None:
        if "mp4" not in sample.fields or not sample.fields["mp4"]:
            return None
        times = np.arange(part * 3, part * 3 + 3) / 2
        ends: list[float] = []

        def wanted(timeline: Timeline) -> list[float]:
            ends.append(timeline.end)
            return [time for time in times if time < timeline.end]

        frames = read_frames(sample.fields["mp4"], wanted)
        return DecodedFrames(frames.pixels, frames.times, ends[0], ends[0] > times[-1] + 0.5)

    def encode(self, pixels: Sequence[Any]) -> np.ndarray:
        numbers = np.array(numbers_of(np.concatenate(list(pixels))), np.float32)
        self.batches.append(len(numbers))
        return np.stack([numbers, -numbers], axis=1) * self.scale


def publish_videos(place: Path) -> Snapshot:
    """Two shards of two videos; the second shard has a sample without a video, too, and one with an empty one."""
    place.mkdir(exist_ok=True)
    bodies = [encoded_video(numbered(length), unit=Fraction(1, 10)) for length in LENGTHS]
    contents: list[list[bytes | None]] = [bodies[:2], [*bodies[2:], None, b""]]
    shards = []
    for number, some in enumerate(contents):
        with open(place / f"{number:05d}.tar", "wb") as file:
            writer = TarWriter(file)
            for index, body in enumerate(some):
                fields = {"txt": b"a video"} | ({} if body is None else {"mp4": body})
                writer.write(Sample(f"{number:05d}{index}", fields))
            writer.close()
        tar = place / f"{number:05d}.tar"
        size = tar.stat().st_size
        shards.append(Shard(name=f"{number:05d}", samples=len(some), bytes=size, sha256=file_digest(tar)))
    fields = ("mp4", "txt")
    return publish_shards(Folder(place), tuple(shards), fields=fields, card=None, options={}, rows=6, dropped={})


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    return publish_videos(tmp_path)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_each_video_has_the_features_of_its_frames(snapshot: Snapshot, batch_size: int) -> None:
    model = Numbers()
    made = embed_frames(snapshot, lambda threads: model, EmbedOptions(name="frames", batch_size=batch_size), HERE)
    assert [sorted(shard.sidecars) for shard in made.shards] == [["frames"], ["frames"]]
    assert max(model.batches) < batch_size + 3
    lengths = iter(LENGTHS)
    for shard in made.shards:
        stored = read_frame_features(Folder(made.folder), shard)
        for row in range(2):
            length, found = next(lengths), stored[row]
            there = -(-length // 5)
            assert found.times.tolist() == [number / 2 for number in range(there)]
            assert found.features.tolist() == [[5 * number, -5 * number] for number in range(there)]
            assert found.features.dtype == np.float16 and found.seconds == pytest.approx(length / 10)
    assert stored.keys[2:] == ["000012", "000013"]
    assert [len(stored[row].times) for row in (2, 3)] == [0, 0]


def test_finished_shards_are_not_read_again_and_other_models_are_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    options = EmbedOptions(name="frames")
    first = embed_frames(snapshot, lambda threads: Numbers(), options, HERE)
    again = Numbers()
    same = embed_frames(first, lambda threads: again, options, HERE)
    assert not again.batches and same.shards == first.shards
    (tmp_path / "00001.frames.parquet").unlink()
    half = Numbers()
    assert embed_frames(first, lambda threads: half, options, HERE).shards == first.shards
    assert sum(half.batches) == 1 + 9
    with pytest.raises(SidecarError, match="another --name keeps both"):
        embed_frames(first, lambda threads: Numbers(maker="other"), options, HERE)
    with pytest.raises(DataError, match="too large for half precision"):
        embed_frames(first, lambda threads: Numbers(maker="b", scale=1e6), EmbedOptions(name="big"), HERE)


def test_a_snapshot_without_videos_is_refused(make_snapshot: Any) -> None:
    with pytest.raises(SettingError, match="samples with videos"):
        embed_frames(make_snapshot((2,)), lambda threads: Numbers(), EmbedOptions(name="frames"), HERE)


def test_a_broken_sidecar_names_the_job(snapshot: Snapshot) -> None:
    folder, (shard, _) = Folder(snapshot.folder), snapshot.shards
    with pytest.raises(SidecarError, match=r"missing; make it with jobs/embed_dataset\.py frames"):
        read_frame_features(folder, shard)


def test_batches_of_a_snapshot_have_the_features(snapshot: Snapshot) -> None:
    embed_frames(snapshot, lambda threads: Numbers(), EmbedOptions(name="frames"), HERE)
    made = read_snapshot(snapshot.folder)
    reader = FrameFeatureReader(sampling=FrameSampling(frames=4, rate=2.0), teacher="t")
    (batch,) = snapshot_batches(made, [reader], batch_size=8, config=LoaderConfig(loader_workers=0))
    assert batch["replaced"].item() == 2 and batch["video"].shape == (4, 4, 2)
    assert batch["video"][..., 0].tolist() == [[0, 5, 10, 0], [0, 95, 195, 295], [0, 0, 0, 0], [0, 10, 25, 40]]
    assert batch["video_mask"].sum(dim=1).tolist() == [3, 4, 1, 4]
    other = FrameFeatureReader(teacher="another")
    with pytest.raises(SidecarError, match="was made with the teacher t, not another"):
        list(snapshot_batches(made, [other], batch_size=8, config=LoaderConfig(loader_workers=0)))


def test_a_clips_features_are_those_of_its_tower_for_videos_of_any_length(tmp_path: Path) -> None:
    """Frames decoded one by one, transformed and encoded alone; more than one part; not normalised."""
    torch.manual_seed(0)
    clip = Clip(Clip.smallest()).eval()
    model = FrameEmbedder(clip, FrameRate(frames_per_second=5.0))
    images = np.random.default_rng(0).integers(0, 256, (160, 12, 16, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    body = encoded_video(images, unit=Fraction(1, 10), options={"crf": "18"})
    parts = []
    sample = Sample("a", {"mp4": body})
    while not parts or parts[-1].more:
        parts.append(model.decode(sample, len(parts)))
    assert [len(part.times) for part in parts] == [PART, 80 - PART]
    times = np.concatenate([part.times for part in parts])
    assert times == pytest.approx(np.arange(80) / 5) and parts[0].seconds == pytest.approx(16.0)
    found = model.encode([part.pixels for part in parts])
    transform = clip.transforms(train=False)
    for place in (0, 63, 64, 79):
        image = transform(read_frames(body, [place / 5]).pixels[0])[None]
        with torch.no_grad():
            wanted = clip.model.encode_image((image.float() - clip.mean) / clip.std)[0].numpy()
        np.testing.assert_allclose(found[place], wanted, rtol=1e-3, atol=1e-4)
    assert model.facts["width"] == found.shape[1] and model.facts["frames_per_second"] == 5.0
    assert model.decode(Sample("b", {"mp4": b"nothing"}), 0) is None and model.decode(Sample("c", {}), 0) is None
    other = FrameEmbedder(clip, FrameRate(frames_per_second=1.0))
    assert other.maker != model.maker and other.facts["teacher"] == model.facts["teacher"]
    snapshot = publish_videos(tmp_path)
    made = embed_frames(snapshot, lambda threads: other, EmbedOptions(name="frames"), HERE)
    schema = read_sidecar_schema(Folder(made.folder), made.shards[0], "frames", "the job", other.maker)
    assert sidecar_facts(schema, "file", "the job") == other.facts


@pytest.mark.parametrize("rate", [0.0, 61.0])
def test_bad_rates(rate: float) -> None:
    with pytest.raises(SettingError, match="frames_per_second"):
        FrameRate(frames_per_second=rate)
