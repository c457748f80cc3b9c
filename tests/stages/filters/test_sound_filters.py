"""Filters of sounds: length, level, silence, clipping from columns or by decoding; near duplicates by spectrogram."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.codecs.audio import AudioOptions
from pipeline.codecs.options import MediaOptions
from pipeline.errors import DataError, SettingError
from pipeline.shards.media import AUDIO, Medium
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.waveforms import read_waveform, resampled
from pipeline.sources.drawn import sets
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.sound import draw_sound
from pipeline.sources.sound_table import SoundTable
from pipeline.sources.source import SOUND_UNCHANGED
from pipeline.stages.filters import sound
from pipeline.stages.filters.filter import Filter
from pipeline.stages.filters.perceptual import perceptual_hashes
from pipeline.stages.filters.run import filter_snapshot, read_reasons
from pipeline.stages.filters.sound import COLUMNS, Sound, sound_values
from pipeline.stages.filters.sound_duplicates import SoundDuplicates, sound_thumbnail
from pipeline.stages.filters.view import ShardView
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers
from tests.sounds import by_ffmpeg, encoded, tone

RATE = 16_000


def snapshot_of(tmp_path: Path, bodies: list[bytes]) -> Snapshot:
    """The sounds as they are, three to a shard."""
    lines = ["file_name", *(f"{number}.bin" for number in range(len(bodies)))]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "table.csv").write_text("\n".join(lines))
    for number, body in enumerate(bodies):
        (tmp_path / "set" / f"{number}.bin").write_bytes(body)
    options = ShardOptions(
        media=MediaOptions(audio=AudioOptions(**{**SOUND_UNCHANGED, "audio_min_seconds": 0.0})),  # type: ignore[arg-type]
        number_sample_per_shard=3,
    )
    source = SoundTable(folder=str(tmp_path / "set"), table="table.csv")
    return refresh(source, Folder(tmp_path / "out"), options, Workers(processes_count=0))


def reasons(snapshot: Snapshot, *filters: Filter) -> list[str]:
    """Each sample's reason, "" where it stays; always with a snapshot that loses something."""
    outcome = filter_snapshot(snapshot, filters, Workers(processes_count=0))
    return [reason for _, table in read_reasons(outcome.snapshot) for reason in table["reason"].to_pylist()]


BODIES = [
    encoded(tone(RATE, 2.0), RATE),
    encoded(tone(RATE, 0.4), RATE),
    encoded(tone(RATE, 9.0), RATE),
    encoded(tone(RATE, 2.0, level=5e-4), RATE),
    encoded(np.concatenate([tone(RATE, 0.1), np.zeros(2 * RATE, np.float32)]), RATE),
    encoded(np.clip(4 * tone(RATE, 2.0), -1, 1), RATE),
    encoded(tone(44_100, 2.0), 44_100, "OGG", "VORBIS"),
]
WANTED = ["", "sound.short", "sound.long", "sound.soft", "sound.silent", "sound.clipped", ""]


def test_each_bound_has_its_reason(tmp_path: Path) -> None:
    assert reasons(snapshot_of(tmp_path, BODIES), Sound(max_sound_seconds=5.0)) == WANTED


def test_values_by_decoding_are_those_of_the_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = snapshot_of(tmp_path, BODIES)
    view = ShardView(Folder(tmp_path / "out"), snapshot.shards[0])
    stored, _ = sound_values(view)
    monkeypatch.setattr(sound, "COLUMNS", tuple(f"other_{name}" for name in COLUMNS))
    decoded, unreadable = sound_values(view)
    assert not unreadable.any()
    for name in COLUMNS:
        np.testing.assert_allclose(decoded[f"other_{name}"], stored[name], rtol=1e-6)


def test_samples_without_a_sound_stay_and_broken_ones_go() -> None:
    class View:
        def column(self, name: str) -> list[Any]:
            raise DataError(name)

        def bodies(self, medium: Medium) -> list[bytes | None]:
            assert medium is AUDIO
            return [None, b"fLaC x", BODIES[0]]

        def __len__(self) -> int:
            return 3

    verdict = Sound().judge(View(), None)  # type: ignore[arg-type]
    assert verdict.drops["unreadable"].tolist() == [False, True, False]
    assert not any(mask[0] or mask[2] for mask in verdict.drops.values())


def drawn(index: int) -> np.ndarray:
    scene = sets.scene_of("train", Draws(0, "train", index, "scene"), index, 64)
    return read_waveform(draw_sound(scene, "shapes", 0, index, 1.5).flac, seconds=9).samples[0]


def test_copies_of_sounds_are_found(tmp_path: Path) -> None:
    first, second, third = (drawn(index) for index in (1, 4, 7))
    bodies = [
        encoded(first, RATE),
        encoded(second, RATE),
        encoded(first * 0.2, RATE),  # softer
        encoded(resampled(second[None], RATE, 44_100)[0], 44_100),  # another rate
        encoded(third, RATE),
        encoded(first, RATE, "OGG", "VORBIS"),
        by_ffmpeg(resampled(third[None], RATE, 44_100)[0], 44_100),  # AAC
        encoded(third[: RATE // 2], RATE),  # a part
    ]
    found = reasons(snapshot_of(tmp_path, bodies), SoundDuplicates())
    copy = "sound_duplicates.near_duplicate"
    assert found == ["", "", copy, copy, "", copy, copy, ""]


def test_different_sounds_have_distant_hashes() -> None:
    hashes = perceptual_hashes(
        np.stack(
            [
                thumbnail
                for index in range(40)
                if (thumbnail := sound_thumbnail(encoded(drawn(index), RATE))) is not None
            ]
        )
    )
    assert len(hashes) == 40
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])[np.triu_indices(40, 1)]
    assert (distances <= 6).mean() < 0.01 and np.median(distances) > 28


def test_most_copies_with_silence_around_them_are_found() -> None:
    quiet, found = np.zeros(3_000, np.float32), []
    for index in range(20):
        bodies = encoded(drawn(index), RATE), encoded(np.concatenate([quiet, drawn(index), quiet]), RATE)
        thumbnails = [thumbnail for body in bodies if (thumbnail := sound_thumbnail(body)) is not None]
        one, other = perceptual_hashes(np.stack(thumbnails))
        found.append(np.bitwise_count(one ^ other) <= SoundDuplicates().distance)
    assert np.mean(found) >= 0.8


def test_silence_and_damage_have_no_hash() -> None:
    assert sound_thumbnail(encoded(np.zeros(RATE, np.float32), RATE)) is None
    assert sound_thumbnail(b"fLaC nothing") is None and sound_thumbnail(b"") is None
    assert sound_thumbnail(encoded(tone(RATE, 0.01), RATE)) is not None


@pytest.mark.parametrize(
    ("field", "made"),
    [
        ("min_sound_seconds", Sound(min_sound_seconds=-1)),
        ("max_sound_seconds", Sound(max_sound_seconds=0.5)),
        ("min_sound_level", Sound(min_sound_level=1)),
        ("max_silent", Sound(max_silent=2)),
        ("max_clipped", Sound(max_clipped=-1)),
        ("max_sound_hamming", SoundDuplicates(max_sound_hamming=17)),
    ],
)
def test_bad_settings(field: str, made: Filter) -> None:
    with pytest.raises(SettingError, match=field):
        made.check()
