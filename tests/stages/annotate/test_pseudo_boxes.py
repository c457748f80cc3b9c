"""Pseudo boxes by a teacher whose boxes are known: what is stored, in which order, how often, and what is counted."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from pipeline.errors import DataError, SettingError, SidecarError
from pipeline.loaders.phrases import ReadSampleCaptions
from pipeline.shards.objects import overlaps
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import sidecar_file
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.annotator import Annotation, annotate
from pipeline.stages.annotate.caption_phrases import AnnotatedPhrases, ExtractedPhrases, StoredPhrases
from pipeline.stages.annotate.phrases import LoadPhraseMaker
from pipeline.stages.annotate.pseudo_box_maker import (
    FoundBoxes,
    LoadPseudoBoxMaker,
    PseudoBoxMaker,
    PseudoBoxOptions,
    kept_boxes,
    length_buckets,
    make_pseudo_boxes,
    padded_work,
    suppressed,
)
from pipeline.stages.annotate.pseudo_boxes import (
    PseudoBoxCounts,
    counts_of_row,
    objects_of_row,
    read_counts,
    read_pseudo_boxes,
)
from pipeline.stages.shard_tasks import Workers
from tests.conftest import RayCluster
from tests.grounded import LetterTeacher, WordPhrases, jpeg, load_letters, publish

LOCAL = Workers(processes_count=0)


def captioned(key: str, caption: str, height: int = 32, width: int = 48) -> Sample:
    return Sample(key, {"jpg": jpeg(height, width), "txt": caption.encode()})


def rows_of(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    folder = Folder(snapshot.folder)
    return {row["key"]: row for shard in snapshot.shards for row in read_pseudo_boxes(folder, shard)}


def make(snapshot: Snapshot, **options: Any) -> Snapshot:
    return make_pseudo_boxes(snapshot, load_letters, WordPhrases(), PseudoBoxOptions(**options), LOCAL)


def test_rows_of_every_kind_of_sample(tmp_path: Path) -> None:
    """Captions with, without and of no phrases, unreadable and missing images; all in the order of the tar."""
    samples = [
        captioned("0", "dog x caterpillar"),
        captioned("1", ""),
        Sample("2", {"jpg": jpeg(20, 30)}),
        Sample("3", {"jpg": b"no image", "txt": b"dog"}),
        Sample("4", {"txt": b"dog"}),
        captioned("5", "x \u00e9t\u00e9", 64, 16),
        captioned("6", "a" * 29 + " hidden"),
    ]
    snapshot = make(publish(tmp_path, samples), batch_size=2)
    rows = rows_of(snapshot)
    assert list(rows) == [one.key for one in samples]
    first = rows["0"]
    assert (first["height"], first["width"], first["captions"]) == (32, 48, ["dog x caterpillar"])
    assert [(one["start"], one["end"]) for one in first["phrases"]] == [(0, 3), (4, 5), (6, 17)]
    # The second box of a phrase overlaps the first one; the third has a score that is too low for "dog".
    assert first["boxes"] == [6, 0, 48, 32, 0, 0, 4, 4, 0, 0, 48, 32] and first["phrase"] == [2, 2, 0]
    assert first["scores"] == pytest.approx([1.0, 0.55, 0.3])
    assert rows["1"]["phrases"] == [] and rows["1"]["captions"] == [""] and rows["1"]["height"] == 32
    assert rows["2"]["captions"] == [] and rows["2"]["height"] == 20 and rows["3"]["height"] == 0
    assert rows["4"]["height"] == 0 and rows["5"]["boxes"][:4] == [2, 0, 16, 64]
    assert [one["cut"] for one in rows["6"]["phrases"]] == [False, True] and set(rows["6"]["phrase"]) == {0}
    counts = sum((read_counts(Folder(snapshot.folder), shard) for shard in snapshot.shards), PseudoBoxCounts())
    expected = {
        "images": 7,
        "unreadable": 2,
        "without_caption": 1,
        "captions": 4,
        "without_phrases": 1,
        "without_boxes": 2,
    }
    assert {name: getattr(counts, name) for name in expected} == expected
    assert (counts.phrases, counts.unusable, counts.cut, counts.found) == (7, 10, 1, 4)
    assert counts.boxes == sum(len(row["scores"]) for row in rows.values()) == 6
    assert counts.boxes_from(0.5) == sum(score >= 0.5 for row in rows.values() for score in row["scores"])
    assert counts.metrics()["boxes_per_caption"] == pytest.approx(6 / 4)
    assert "6 boxes" in str(counts) and "4 of 7 phrases" in str(counts)


def test_objects_of_a_row_follow_the_threshold(tmp_path: Path) -> None:
    rows = rows_of(make(publish(tmp_path, [captioned("0", "dog x caterpillar")])))
    whole, strict = objects_of_row(rows["0"]), objects_of_row(rows["0"], 0.5)
    assert whole is not None and strict is not None and whole.open_labels
    assert whole.labels == ("caterpillar", "caterpillar", "dog") and strict.labels == ("caterpillar",) * 2
    assert [one.objects for one in whole.phrases] == [(2,), (), (0, 1)]
    assert [one.objects for one in strict.phrases] == [(), (), (0, 1)] and strict.left_out == 1
    assert strict.scores == pytest.approx([1.0, 0.55]) and strict.caption == "dog x caterpillar"


def test_every_caption_of_an_image_is_grounded(tmp_path: Path) -> None:
    """The boxes of each caption are those of the caption alone; phrases of all captions are numbered together."""
    texts = ["dog x caterpillar", "", "bird", "a" * 29 + " hidden"]
    (row,) = rows_of(make(publish(tmp_path / "all", [captioned("0", "|".join(texts))]))).values()
    assert row["captions"] == texts and [one["caption"] for one in row["phrases"]] == [0, 0, 0, 2, 3, 3]
    boxes = np.array(row["boxes"]).reshape(-1, 4)
    for number, text in enumerate(texts):
        (alone,) = rows_of(make(publish(tmp_path / f"{number}", [captioned("0", text)]))).values()
        mine = [place for place, phrase in enumerate(row["phrase"]) if row["phrases"][phrase]["caption"] == number]
        assert boxes[mine].ravel().tolist() == alone["boxes"] and [row["scores"][n] for n in mine] == alone["scores"]
        found, expected = objects_of_row(row, 0.5), objects_of_row(alone, 0.5)
        assert found is not None and expected is not None
        named = [
            (one.start, one.end, found.boxes[list(one.objects)].tolist()) for one in found.captions[number].phrases
        ]
        assert found.captions[number].text == text
        assert named == [(one.start, one.end, expected.boxes[list(one.objects)].tolist()) for one in expected.phrases]
        labels = [found.labels[n] for one in found.captions[number].phrases for n in one.objects]
        assert sorted(labels) == sorted(expected.labels)
    counts = counts_of_row(row)
    assert (counts.images, counts.captions, counts.without_phrases, counts.cut) == (1, 4, 1, 1)


def test_finished_shards_are_kept_and_other_settings_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make(publish(tmp_path, [captioned(f"{n}", f"dog number{n}") for n in range(8)]))
    files = [tmp_path / sidecar_file(shard, "boxes") for shard in snapshot.shards]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    files[1].unlink()
    again = make(read_snapshot(str(tmp_path)))
    assert [file.read_bytes() for file in files] == [content for content, _ in before]
    assert files[0].stat().st_mtime_ns == before[0][1] and again.digest == snapshot.digest
    with pytest.raises(SidecarError, match="--overwrite"):
        make(snapshot, least_score=0.5)
    replaced = make(snapshot, least_score=0.5, overwrite=True)
    assert all(min(row["scores"], default=1) >= 0.5 for row in rows_of(replaced).values())
    beside = make(replaced, name="others")
    assert set(beside.shards[0].sidecars) == {"boxes", "others"}


def test_boxes_do_not_depend_on_batches(tmp_path: Path) -> None:
    random, samples = np.random.default_rng(0), []
    for number in range(40):
        words = ["word" * random.integers(1, 4) for _ in range(random.integers(1, 9))]
        height, width = ((32, 48), (48, 32), (40, 40))[number % 3]
        samples.append(captioned(f"{number:03d}", " ".join(words), height, width))
    (shard,) = publish(tmp_path, samples, shard_size=40).shards
    teachers = []
    for size, ahead in ((1, 1), (4, 1), (8, 5)):
        teacher = LetterTeacher()
        maker = PseudoBoxMaker(teacher, WordPhrases(), PseudoBoxOptions(batch_size=size, batches_ahead=ahead), 2)
        teachers.append((teacher, maker.table(iter(samples), shard), maker.maker))
    tables = [table.to_pylist() for _, table, _ in teachers]
    assert tables[0] == tables[1] == tables[2] and len({maker for _, _, maker in teachers}) == 1
    assert [row["key"] for row in tables[0]] == [one.key for one in samples]
    assert max(len(batch) for batch in teachers[2][0].batches) == 8 and len(teachers[2][0].batches) == 5


def test_buckets_hold_every_number_once_and_pad_less() -> None:
    random = np.random.default_rng(0)
    sizes = [((800, 1088), (1088, 800), (800, 800))[kind] for kind in random.integers(0, 3, 128)]
    lengths = (random.lognormal(2.5, 0.6, 128).astype(int) + 3).tolist()
    batches = length_buckets(sizes, lengths, 16)
    assert sorted(number for batch in batches for number in batch) == list(range(128))
    plain = [list(range(first, first + 16)) for first in range(0, 128, 16)]
    least = sum(h * w * length for (h, w), length in zip(sizes, lengths, strict=True))
    assert least <= padded_work(sizes, lengths, batches) <= 0.8 * padded_work(sizes, lengths, plain)
    assert padded_work(sizes, lengths, [[number] for number in range(128)]) == least
    assert length_buckets([], [], 4) == []


def test_suppression_is_that_of_torchvision() -> None:
    random = np.random.default_rng(1)
    corners = random.uniform(0, 60, (200, 2))
    boxes = np.concatenate([corners, corners + random.uniform(5, 40, (200, 2))], axis=1)
    scores, spans = random.permutation(200) / 200, random.integers(0, 3, 200)
    found = FoundBoxes(boxes, scores, spans, (False,) * 3)
    kept = kept_boxes(found, 100, 100, PseudoBoxOptions(least_score=0.2, overlap=0.5, most=1000))
    above = np.flatnonzero(scores >= 0.2)
    wanted = batched_nms(*(torch.from_numpy(values[above]) for values in (boxes, scores, spans)), 0.5)
    assert np.array_equal(kept.boxes, boxes[above[wanted.numpy()]])
    assert np.array_equal(kept.spans, spans[above[wanted.numpy()]])
    best = kept_boxes(found, 100, 100, PseudoBoxOptions(least_score=0.2, overlap=0.5, most=7))
    assert np.array_equal(best.scores, kept.scores[:7])
    assert (np.triu(overlaps(boxes[suppressed(boxes, 0.5)], boxes[suppressed(boxes, 0.5)]), 1) <= 0.5).all()


def test_unusable_boxes_of_a_teacher() -> None:
    """NaN, boxes outside of the image, boxes without area: left out. A phrase nobody asked for: an error."""
    nan = float("nan")
    boxes = np.array([[nan, 0, 5, 5], [-5, -5, 5, 5], [9, 9, 8, 20], [200, 0, 300, 5], [0, 0, 0.5, 9], [1, 1, 9, 9]])
    scores = np.array([0.9, 0.8, 0.9, 0.9, 0.9, nan])
    kept = kept_boxes(FoundBoxes(boxes, scores, np.zeros(6, np.int64), (False,)), 50, 50, PseudoBoxOptions())
    assert kept.boxes.tolist() == [[0, 0, 5, 5]]
    with pytest.raises(DataError, match="phrase 1 of 1"):
        kept_boxes(FoundBoxes(boxes[1:2], scores[1:2], np.ones(1, np.int64), (False,)), 50, 50, PseudoBoxOptions())


def test_phrases_of_other_sources(tmp_path: Path) -> None:
    """From ``boxes.json`` those with objects; by an extractor, the noun phrases of the caption."""
    record = {
        "width": 48,
        "height": 32,
        "objects": [{"label": "dog", "bbox": [0, 0, 9, 9], "id": 4}],
        "caption": "a dog sits",
        "more_captions": [{"caption": "dogs", "phrases": [{"start": 0, "end": 4, "objects": [4]}]}, {"caption": ""}],
    }
    record["phrases"] = [{"start": 2, "end": 5, "objects": [4]}, {"start": 6, "end": 10, "objects": []}]
    sample = captioned("0", "a red dog sits on the grass")
    sample.fields["boxes.json"] = json.dumps(record).encode()
    first, second = AnnotatedPhrases().of_shard(None)(sample)  # type: ignore[arg-type]
    assert (first.caption, list(first.spans)) == ("a dog sits", [(2, 5)])
    assert (second.caption, list(second.spans)) == ("dogs", [(0, 4)])
    source = ExtractedPhrases("rules", ReadSampleCaptions(caption="txt"))
    (found,) = source.of_shard(None)(sample)  # type: ignore[arg-type]
    assert [found.caption[slice(*span)] for span in found.spans] == ["red dog", "grass"]
    assert source.of_shard(None)(Sample("1", {})) == []  # type: ignore[arg-type]
    sample.fields["json"] = json.dumps({"captions": ["a red dog", " ", "the \ud83d bus"]}).encode()
    several = ExtractedPhrases("rules", ReadSampleCaptions(caption="auto")).of_shard(None)(sample)  # type: ignore[arg-type]
    assert [(one.caption, list(one.spans)) for one in several] == [("a red dog", [(2, 9)]), ("the ? bus", [(6, 9)])]
    with pytest.raises(SettingError):
        ExtractedPhrases("nobody", ReadSampleCaptions(caption="txt"))


def test_stored_phrases_of_several_captions(tmp_path: Path) -> None:
    """From a sidecar as by its extractor, caption by caption; a caption without phrases stays."""
    texts = [["a red dog", "of and the", "two cats on the \ud83d mat"], ["a bus"], []]
    samples = [Sample(f"{n}", {"json": json.dumps({"captions": some}).encode()}) for n, some in enumerate(texts)]
    read = ReadSampleCaptions(caption="auto")
    load = LoadPhraseMaker(extractor="rules", caption="auto", captions=read)
    snapshot = annotate(publish(tmp_path, samples), load, Annotation(name="phrases"), LOCAL, use_gpu=False)
    stored = StoredPhrases(snapshot, "phrases", "auto", read).of_shard(snapshot.shards[0])
    extracted = ExtractedPhrases("rules", read).of_shard(snapshot.shards[0])
    found = [stored(one) for one in samples]
    assert found == [extracted(one) for one in samples]
    spelt = [[[text.caption[slice(*span)] for span in text.spans] for text in some] for some in found]
    assert spelt == [[["red dog"], [], ["two cats", "mat"]], [["bus"]], []]


def test_options_are_checked() -> None:
    for wrong in ({"name": "a b"}, {"least_score": 2.0}, {"overlap": 0.0}, {"batch_size": 0}, {"smallest": -1.0}):
        with pytest.raises(SettingError):
            PseudoBoxOptions(**wrong)


def test_counts_of_another_file_are_refused(tmp_path: Path) -> None:
    from tests.grounded import row

    snapshot = publish(tmp_path, [captioned("0", "dog")], rows=[row("0", "dog", [(0, 3)])])
    with pytest.raises(SidecarError, match="counts"):
        read_counts(Folder(snapshot.folder), snapshot.shards[0])


def test_on_a_cluster_the_boxes_are_the_same(tmp_path: Path, ray_cluster: RayCluster) -> None:
    """The annotator travels to the actors; a sidecar that exists is kept."""
    samples = [captioned(f"{number:03d}", f"dog number{number} caterpillar") for number in range(12)]
    alone = make(publish(tmp_path / "alone", samples))
    given = publish(tmp_path / "ray", samples)
    phrases, options = ExtractedPhrases("rules", ReadSampleCaptions(caption="txt")), PseudoBoxOptions()
    together = make_pseudo_boxes(given, load_letters, WordPhrases(), options, Workers(processes_count=2))
    assert rows_of(together) == rows_of(alone)
    assert [one.sidecars for one in together.shards] == [one.sidecars for one in alone.shards]
    assert pickle.loads(pickle.dumps(LoadPseudoBoxMaker(load_letters, phrases, options)))(1).maker
