"""Filters with a global view, compared with brute force and third-party libraries."""

import io
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import SettingError, SidecarError
from pipeline.shards.snapshot import Snapshot
from pipeline.stages.filters import duplicates, semantic
from pipeline.stages.filters.clip_score import ClipScore
from pipeline.stages.filters.duplicates import ExactDuplicates
from pipeline.stages.filters.filter import Filter
from pipeline.stages.filters.length import Length
from pipeline.stages.filters.perceptual import (
    PerceptualDuplicates,
    block_masks,
    grey_thumbnail,
    join_pairs,
    pairs_within,
    perceptual_hashes,
)
from pipeline.stages.filters.run import filter_snapshot, read_reasons
from pipeline.stages.filters.semantic import SemanticDuplicates, closest_before
from pipeline.stages.shard_tasks import Workers

HERE = Workers(processes_count=0)


def kept(snapshot: Snapshot, *filters: Filter) -> list[int]:
    """Numbers of the samples that stay."""
    return [number for number, reason in enumerate(reasons(snapshot, *filters)) if not reason]


def reasons(snapshot: Snapshot, *filters: Filter) -> list[str]:
    outcome = filter_snapshot(snapshot, filters, HERE)
    if outcome.snapshot.id == snapshot.id:
        return [""] * snapshot.samples
    return [reason for _, table in read_reasons(outcome.snapshot) for reason in table["reason"].to_pylist()]


@pytest.mark.parametrize("part_rows", [1_000_000, 4])
def test_exact_duplicates_keep_the_first(make_data: Any, monkeypatch, part_rows):
    monkeypatch.setattr(duplicates, "PART_ROWS", part_rows)
    monkeypatch.setattr(duplicates.parts_of, "__defaults__", (part_rows,))
    numbers = np.random.default_rng(0).integers(0, 12, 31).tolist()
    snapshot = make_data(["a"] * 31, [make_data.photograph(number) for number in numbers], per_shard=4)
    assert kept(snapshot, ExactDuplicates()) == [row for row in range(31) if numbers[row] not in numbers[:row]]


def test_exact_duplicates_trust_the_digest_of_the_download(make_data: Any):
    digests = ["aa" * 32, "bb" * 32, "aa" * 32, "cc" * 32]
    assert kept(make_data(["a"] * 4, columns={"sha256": digests}), ExactDuplicates()) == [0, 1, 3]


def test_what_an_earlier_filter_dropped_is_nobodys_original(make_data: Any):
    images = [make_data.photograph(number) for number in (0, 0, 1, 0)]
    snapshot = make_data(["short", "long enough to stay", "this one stays too", "long enough to stay"], images)
    assert reasons(snapshot, Length(), ExactDuplicates()) == ["length.few_words", "", "", "exact_duplicates.duplicate"]


def saved(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_hashes_of_small_images_are_imagehashs_own():
    grey = np.random.default_rng(0).integers(0, 256, (200, 32, 32), dtype=np.uint8)
    theirs = [int(str(imagehash.phash(Image.fromarray(one))), 16) for one in grey]
    assert perceptual_hashes(grey).tolist() == theirs
    assert all((grey_thumbnail(saved(one)) == one).all() for one in grey[:20])


def test_hashes_of_photographs_are_close_to_imagehashs(make_data: Any):
    sizes = [(96, 64), (640, 480), (1600, 300), (33, 40), (20, 24)]
    far = []
    for number in range(40):
        data = make_data.photograph(number, *sizes[number % len(sizes)])
        thumbnail = grey_thumbnail(data)
        assert thumbnail is not None
        ours = int(perceptual_hashes(thumbnail[None])[0])
        far.append((ours ^ int(str(imagehash.phash(Image.open(io.BytesIO(data)))), 16)).bit_count())
    # Pillow shrinks with Lanczos, we by areas: two bits on average, where strangers differ in 32.
    assert np.mean(far) <= 2 and max(far) <= 8


@pytest.mark.parametrize("data", [b"", b"no image", saved(np.zeros((4, 4), np.uint8))[:40]])
def test_what_cannot_be_decoded_has_no_hash(data):
    assert grey_thumbnail(data) is None


@pytest.mark.parametrize("distance", [0, 1, 3, 6])
@pytest.mark.parametrize("count", [50, 100_000_000])  # how many the masks are made for: it decides on the blocks
def test_no_pair_is_missed(distance, count):
    random = np.random.default_rng(distance)
    centres = random.integers(0, 1 << 63, 60, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in random.choice(64, bits, replace=False)) for bits in (1, 3, 5, 7) * 60]
    near = [centre ^ np.uint64(flip) for centre, flip in zip(np.repeat(centres, 4), flips, strict=True)]
    hashes = np.unique(np.concatenate([centres, np.array(near, np.uint64)]))
    found = set()
    for mask in block_masks(distance, count):
        left, right = pairs_within(hashes, mask, distance)
        found |= {(min(pair), max(pair)) for pair in zip(left.tolist(), right.tolist(), strict=True)}
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    assert found == {(i, j) for i, j in np.argwhere(apart <= distance).tolist() if i < j}


def test_pairs_join_to_clusters():
    random = np.random.default_rng(0)
    for _ in range(50):
        count = 40
        left, right = random.integers(0, count, (2, int(random.integers(0, 40))))
        label = list(range(count))
        for _ in range(count):
            for one, other in zip(left, right, strict=True):
                label[one] = label[other] = min(label[one], label[other])
        assert join_pairs(count, left, right).tolist() == label


def test_near_duplicates_keep_the_first_of_a_cluster(make_data: Any):
    looks = [(0, 96, 64), (1, 96, 64), (0, 192, 128), (2, 96, 64), (1, 48, 32), (0, 96, 64, 40), (3, 96, 64)]
    images = [make_data.photograph(*look) for look in looks]
    snapshot = make_data(["a"] * 9, [*images, b"broken", b"broken"])
    assert kept(snapshot, PerceptualDuplicates(max_hamming=6)) == [0, 1, 3, 6, 7, 8]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_closest_before_is_brute_forces(monkeypatch):
    monkeypatch.setattr(semantic, "BLOCK", 7)
    rows = unit(np.random.default_rng(0).normal(size=(40, 5))).astype(np.float32)
    closest, cosine = closest_before(rows)
    for row in range(1, 40):
        cosines = rows[:row] @ rows[row]
        assert closest[row] == cosines.argmax() and cosine[row] == pytest.approx(cosines.max(), abs=1e-6)
    assert cosine[0] == -np.inf


def test_semantic_duplicates_follow_the_papers_algorithm(make_data: Any):
    random = np.random.default_rng(1)
    centres = unit(random.normal(size=(6, 16)))
    rows = unit(centres[random.integers(0, 6, 60)] + 0.08 * random.normal(size=(60, 16))).astype(np.float16)
    snapshot = make_data(["a"] * 60, per_shard=7)
    make_data.add_embeddings(snapshot, rows, skip={5})
    present = np.array([row for row in range(60) if row != 5])
    vectors = rows[present].astype(np.float32)
    found = reasons(snapshot, SemanticDuplicates(epsilon=0.1, clusters=1))
    # With one cluster the algorithm can be written down in a few lines.
    (centroid,) = Path(snapshot.folder).glob("_filters/*/semantic_duplicates/centroids/*.parquet")
    centre = np.array(pq.read_table(centroid)["centroid"].to_pylist()[0], np.float32)
    assert centre @ vectors.mean(0) > 0.99 * np.linalg.norm(vectors.mean(0))
    order = np.lexsort((present, vectors @ centre))
    cosines = np.triu(vectors[order] @ vectors[order].T, k=1).max(axis=0)
    expected = sorted(present[order[cosines <= 1 - 0.1]].tolist())
    assert found[5] == "semantic_duplicates.no_embedding"
    assert [row for row in range(60) if not found[row]] == expected
    assert 6 <= len(expected) < 50


def test_semantic_duplicates_are_found_within_clusters(make_data: Any, monkeypatch):
    monkeypatch.setattr(semantic, "PART_ROWS", 10)
    directions = np.repeat(np.eye(8), 4, axis=0)
    snapshot = make_data(["a"] * 32, per_shard=5)
    make_data.add_embeddings(snapshot, directions[np.random.default_rng(0).permutation(32)])
    left = kept(snapshot, SemanticDuplicates(clusters=8))
    assert len(left) == 8


def test_a_missing_sidecar_names_the_job(make_data: Any):
    with pytest.raises(SidecarError, match="make it with jobs/embed_dataset.py"):
        filter_snapshot(make_data(["a"]), [ClipScore()], HERE)


def test_embeddings_that_are_nan_are_none(make_data: Any):
    snapshot, rows = make_data(["a"] * 3), np.eye(3)
    rows[1] = np.nan
    make_data.add_embeddings(snapshot, rows, rows)
    assert reasons(snapshot, ClipScore()) == ["", "clip_score.no_score", ""]


def scored(make_data: Any, scores: list[float]) -> Snapshot:
    snapshot = make_data(["a"] * len(scores))
    text = np.array([[score, np.sqrt(1 - score**2)] for score in scores])
    make_data.add_embeddings(snapshot, np.tile([1.0, 0.0], (len(scores), 1)), text)
    return snapshot


def test_clip_score_has_laions_threshold(make_data: Any):
    assert kept(scored(make_data, [0.3, 0.27, 0.29, -0.5, 1.0]), ClipScore()) == [0, 2, 4]


def test_sounds_are_scored_against_captions(make_data: Any):
    """The second pair is far apart, the third sound has no features; images are not there."""
    snapshot = make_data(["a"] * 3)
    audio = np.array([[0.6, 0.8], [1.0, 0.0], [np.nan, np.nan]])
    make_data.add_embeddings(snapshot, text=np.array([[0.0, 1.0]] * 3), audio=audio)
    found = reasons(snapshot, ClipScore(clip_medium="audio"))
    assert found == ["", "clip_score.clip_score", "clip_score.no_score"]
    with pytest.raises(SidecarError, match="has no image"):
        filter_snapshot(snapshot, [ClipScore()], HERE)


def test_clip_score_from_a_column(make_data: Any):
    snapshot = make_data(["a"] * 4, columns={"similarity": [0.28, 0.2799, None, 0.4]})
    found = reasons(snapshot, ClipScore(score_column="similarity"))
    assert found == ["", "clip_score.clip_score", "clip_score.no_score", ""]


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.3, 0.5, 1.0])
def test_the_best_fraction_is_the_sorted_ones(make_data: Any, fraction):
    random = np.random.default_rng(0)
    scores = np.concatenate([random.normal(0.2, 0.1, 50), -random.random(20), [0.0, -0.0, 0.25, 0.25, 0.25]])
    scores = random.permutation(scores.astype(np.float32))
    snapshot = make_data(["a"] * 75, columns={"s": scores.astype(float).tolist()}, per_shard=20)
    threshold = np.sort(scores)[::-1][int(np.ceil(fraction * 75)) - 1]
    found = kept(snapshot, ClipScore(score_column="s", clip_fraction=fraction))
    assert found == np.flatnonzero(scores >= threshold).tolist()


@pytest.mark.parametrize(
    ("made", "field"),
    [
        (PerceptualDuplicates(max_hamming=20), "max_hamming"),
        (SemanticDuplicates(epsilon=-0.1), "epsilon"),
        (SemanticDuplicates(clusters=0), "clusters"),
        (ClipScore(min_clip_score=28), "min_clip_score"),
        (ClipScore(clip_fraction=30), "clip_fraction"),
        (ClipScore(clip_medium="smell"), "clip_medium"),
    ],
)
def test_bad_options_are_named(made, field, make_data: Any):
    with pytest.raises(SettingError, match=f"^{field}:"):
        filter_snapshot(make_data(["a"]), [made], HERE)
