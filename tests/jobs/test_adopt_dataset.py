"""The adopting job as its users start it."""

import json
from pathlib import Path

import pytest

from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.loaders.batches import LoaderConfig, training_batches
from pipeline.loaders.frames import ClipReader, FrameSampling
from pipeline.loaders.images import ImageTransform
from pipeline.loaders.mixture import make_order
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.tar import TarWriter
from tests.evaluation.conftest import COLOURS
from tests.evaluation.moving_colours import MovingColourModel, sample
from tests.jobs.conftest import Type


def test_smoke_adopts_plain_tars(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("adopt_dataset", "smoke", str(tmp_path)) == 0
    snapshot = read_snapshot(str(tmp_path))
    assert snapshot.samples == 48 and snapshot.options["engine"] == "adopted" and snapshot.card == "drawn"
    assert "48 samples in 3 shards" in capsys.readouterr().out


def write_videos(folder: Path) -> None:
    """Two tars as video2dataset writes them: mp4, txt and json of each key, and a mark with its own counts."""
    folder.mkdir()
    for shard in range(2):
        with open(folder / f"{shard:05d}.tar", "wb") as file:
            writer = TarWriter(file)
            for number, colour in enumerate(COLOURS):
                fields = sample(colour, video_metadata={"fps": 4}, caption=f"a {colour} one")
                if shard and colour == "blue":
                    fields["mp4"] = fields["mp4"][:100]  # a broken download
                writer.write(Sample(f"{shard:05d}{number:04d}", fields))
            writer.close()
        mark = {"count": 4, "successes": 3, "failed_to_download": 1, "failed_to_subsample": 0, "duration": 2.0}
        times = {"start_time": 1.7e9, "end_time": 1.7e9 + 2, "status_dict": {"success": 3}}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(mark | times))


def read_frames_of(snapshot: Snapshot, workers: int) -> list[list[int]]:
    """The mean colours of the clips of two epochs, in the order of training."""
    reader = ClipReader(transform=ImageTransform(size=(16, 16)), sampling=FrameSampling(frames=2, rate=4))
    order = make_order(snapshot, seed=0, batch_size=3, lanes=1, shuffle_block=8)
    config = LoaderConfig(loader_workers=workers)
    batches = training_batches(snapshot, [reader], order, steps=range(4), config=config)
    found = [batch["video"].float().mean(dim=(1, 3, 4)).round().int().tolist() for batch in batches]
    return [colour for batch in found for colour in batch]


def test_tars_of_videos_are_trained_and_evaluated_on(job: Type, tmp_path: Path) -> None:
    """A broken video is replaced by another sample in training, and left out in evaluation."""
    folder = tmp_path / "videos"
    write_videos(folder)
    assert job("adopt_dataset", "folder", str(folder), "--processes-count", "0") == 0
    snapshot = read_snapshot(str(folder))
    assert snapshot.fields == ("json", "mp4", "txt") and snapshot.samples == 6
    assert sum(snapshot.dropped.values()) == 2
    colours = read_frames_of(snapshot, 0)
    assert len(colours) == 12 and len(set(map(tuple, colours))) == 3
    assert colours == read_frames_of(snapshot, 2)
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    sets = {"zero_shot": (f"it={folder}",), "retrieval": (f"it={folder}",), "classes": str(tmp_path / "names.txt")}
    found = evaluate(MovingColourModel(), Evaluations(**sets).prepare())
    assert found["zeroshot/it/top1"] == found["retrieval/it/t2v_r1"] == 1 and found["zeroshot/it/samples"] == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["folder", "EMPTY"], "a folder with .tar files"),
        (["folder", "EMPTY", "--card", "drwan"], "--card: got 'drwan'"),
        (["folder", "EMPTY", "--processes-count", "-1"], "--processes-count: got -1"),
        (["fodler", "EMPTY"], "preset: got 'fodler'"),
    ],
)
def test_wrong_settings_are_one_sentence(
    arguments: list[str], said: str, job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("adopt_dataset", *[str(tmp_path) if word == "EMPTY" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
