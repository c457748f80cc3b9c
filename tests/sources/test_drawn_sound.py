"""Sounds of drawn scenes: what is heard follows shapes and colours, the same bytes everywhere, true captions."""

import multiprocessing
import re
from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import SettingError
from pipeline.shards.storage import Folder
from pipeline.shards.waveforms import read_waveform
from pipeline.sources.drawn import sets, world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.hearing import NOISES, SILENCES, write_heard
from pipeline.sources.drawn.scenes import Scene
from pipeline.sources.drawn.sound import LOWEST, OCTAVES, RATE, DrawnSound, band_of, draw_sound, timbre_of
from pipeline.sources.drawn.source import Drawn
from pipeline.sources.source import Row


def rows_of(source: Drawn) -> list[Row]:
    return [row for piece in source.slices(1000, Folder("memory://x")) for row in source.rows(piece)]


def scene_of(split: str, index: int) -> Scene:
    return sets.scene_of(split, Draws(0, split, index, "scene"), index, 64)


def alone(scene: Scene) -> Scene:
    """The scene with its main object only."""
    return replace(scene, objects=(scene.objects[scene.main],), main=0)


def waveform(flac: bytes) -> np.ndarray:
    return read_waveform(flac, seconds=60).samples[0]


def flac_of(index: int) -> bytes:
    return draw_sound(scene_of("train", index), "train", 0, index, 1.0).flac


def test_timbres_and_bands_are_distinct() -> None:
    assert len({timbre_of(shape) for shape in world.SHAPE_NAMES}) == 24
    bands = sorted(band_of(colour) for colour in world.COLOUR_NAMES)
    assert all(low < high for low, high in bands)
    assert all(first[1] < second[0] for first, second in zip(bands, bands[1:], strict=False))
    assert LOWEST < bands[0][0] and bands[-1][1] < LOWEST * 2**OCTAVES


def test_the_same_bytes_in_any_order_and_process() -> None:
    wanted = [flac_of(index) for index in range(6)]
    assert [flac_of(index) for index in reversed(range(6))] == wanted[::-1] and len(set(wanted)) == 6
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(flac_of, range(6)) == wanted


def test_the_pitch_is_the_colours() -> None:
    """The strongest frequency of a single sound with a strong fundamental lies in the band of its colour."""
    right = []
    for index in range(60):
        scene = alone(scene_of("shapes", index))
        look = scene.objects[0].look
        spectrum, envelope = timbre_of(look.shape)
        if spectrum not in ("pure", "hollow", "bright") or envelope == "rising":
            continue
        heard = waveform(draw_sound(scene, "shapes", 0, index, 1.0).flac)
        power = np.abs(np.fft.rfft(heard * np.hanning(len(heard)))) ** 2
        low, high = band_of(look.colour)
        right.append(0.98 * low < np.argmax(power) * RATE / len(heard) < 1.02 * high)
    assert len(right) > 20 and np.mean(right) > 0.95


def spectra(split: str, count: int) -> tuple[np.ndarray, list[str]]:
    """Mean, deviation and maximum over time of 31 bands of each sound, and its shape."""
    features, labels = [], []
    for index in range(count):
        scene = alone(scene_of(split, index))
        heard = waveform(draw_sound(scene, split, 0, index, 0.5).flac)
        frames = np.lib.stride_tricks.sliding_window_view(heard, 512)[::256] * np.hanning(512)
        edges = [*range(0, 32, 2), *range(32, 257, 15)]
        bands = np.log(np.add.reduceat(np.abs(np.fft.rfft(frames)) ** 2, edges, axis=1) + 1e-4)
        features.append(np.concatenate([bands.mean(0), bands.std(0), bands.max(0)]))
        labels.append(scene.objects[0].look.shape)
    return np.stack(features), labels


def test_a_linear_model_hears_shapes() -> None:
    """Timbre follows shape: far above chance (1/24), and below certainty, from coarse spectra alone."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.preprocessing import StandardScaler

    train, labels = spectra("shapes_train", 288)
    test, truth = spectra("shapes", 120)
    scaler = StandardScaler().fit(train)
    score = RidgeClassifier(alpha=10).fit(scaler.transform(train), labels).score(scaler.transform(test), truth)
    assert 0.25 < score < 0.97


def test_several_objects_sound_at_once() -> None:
    """Each object adds energy in its own band of pitch, also where the others are."""
    for index in range(40):
        scene = scene_of("train", index)
        look = scene.objects[scene.main].look
        others = {obj.look.colour for number, obj in enumerate(scene.objects) if number != scene.main}
        if len(scene.objects) < 2 or others == {look.colour}:
            continue
        both, one = (waveform(draw_sound(made, "val", 0, index, 1.0).flac) for made in (scene, alone(scene)))
        if both.any():
            assert np.abs(np.corrcoef(both, one)[0, 1]) < 0.999
            return
    pytest.fail("no scene with two colours")


def test_some_sounds_are_silent_and_some_are_noisy() -> None:
    sounds = [draw_sound(scene_of("train", index), "train", 0, index, 0.5) for index in range(200)]
    silent = [sound for sound in sounds if sound.silent]
    assert 1 <= len(silent) <= 20 and all(not waveform(sound.flac).any() for sound in silent)
    assert 0.1 < np.mean([sound.noisy for sound in sounds]) < 0.4
    loud = [np.abs(waveform(sound.flac)).max() for sound in sounds if not sound.silent]
    assert min(loud) > 0.29 and max(loud) < 0.91
    assert not any(draw_sound(scene_of("shapes", index), "shapes", 0, index, 0.5).silent for index in range(100))


def names_in(text: str) -> set[str]:
    """Shapes that a caption names, by name or synonym."""
    found = {}
    for noun in world.SHAPES:
        for word in (noun.name, *noun.synonyms):
            found[word] = noun.name
    longest = "|".join(map(re.escape, sorted(found, key=len, reverse=True)))
    return {found[word] for word in re.findall(rf"\b(?:{longest})\b", text.lower())}


def test_captions_are_true_or_say_that_they_are_not() -> None:
    false = 0
    for index in range(300):
        scene = scene_of("train", index)
        sound = draw_sound(scene, "train", 0, index, 0.5)
        text, true = write_heard(scene, sound, Draws(0, "train", index, "heard"), world.WRONG_CAPTIONS)
        shown = {obj.look.shape for obj in scene.objects}
        false += not true
        if sound.silent and true:
            assert text.lower().rstrip(".") in SILENCES
        elif true:
            assert names_in(text) and names_in(text) <= shown
            assert scene.objects[scene.main].look.shape in names_in(text)
            assert sound.noisy or not any(noise in text for noise in NOISES)
        else:
            assert not names_in(text) & shown
    assert 3 <= false <= 35


def test_kinds_of_samples() -> None:
    plain = rows_of(Drawn(samples=30, size=64))
    beside = rows_of(Drawn(samples=30, size=64, sound="beside", sound_seconds=0.5))
    for row, with_sound in zip(plain, beside, strict=True):
        assert (with_sound.body("image"), with_sound.caption) == (row.body("image"), row.caption)
        assert with_sound.members == row.members and len(waveform(with_sound.body("audio") or b"")) == RATE // 2
    heard = rows_of(Drawn(samples=30, size=64, sound="alone", sound_seconds=0.5))
    assert [row.body("audio") for row in heard] == [row.body("audio") for row in beside]
    assert all(row.body("image") is None and not row.members and row.caption for row in heard)
    assert Drawn(sound="alone").media == ("audio",) and Drawn().media == ("image",)


def test_in_a_mixed_set_sounds_of_novel_shapes_have_no_text() -> None:
    source = Drawn(samples=120, size=64, sound="mixed", sound_seconds=0.5)
    kinds = {True: set(), False: set()}
    for index, row in enumerate(rows_of(source)):
        novel = any(obj.look.shape in world.NOVEL_SHAPES for obj in scene_of("train", index).objects)
        kinds[novel].add((row.body("image") is not None, row.body("audio") is not None, bool(row.caption)))
    assert kinds[True] == {(True, False, True), (True, True, False)}
    assert len(kinds[False]) == 4


def test_columns_match_the_schema() -> None:
    for sound in ("none", "beside", "alone", "mixed"):
        source = Drawn(samples=8, size=64, sound=sound, sound_seconds=0.5)  # type: ignore[arg-type]
        for row in rows_of(source):
            assert set(row.columns) == set(source.schema())


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("sound", {"sound": "loud"}),
        ("sound", {"sound": "beside", "split": "digits"}),
        ("sound_seconds", {"sound_seconds": 0.1}),
    ],
)
def test_bad_settings(field: str, options: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=field):
        Drawn(**options)  # type: ignore[arg-type]


def test_a_silent_sound_is_named_so() -> None:
    scene = scene_of("train", 0)
    text, true = write_heard(scene, DrawnSound(b"", True, False), Draws(0, "train", 0, "heard"), 0.0)
    assert true and text.lower().rstrip(".") in SILENCES
