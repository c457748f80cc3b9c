"""Statistics of a snapshot compared with counting by hand; the same in any order, with Ray and without."""

import base64
import io
import itertools
import json
import random
import statistics as reference
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.shards.selection import read_samples, select
from pipeline.shards.sidecar import write_sidecar
from pipeline.shards.snapshot import Snapshot, publish_shards, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.report import dataset_statistics
from pipeline.stages.report.dataset_funnel import UNRECORDED, difference, funnel
from pipeline.stages.report.dataset_statistics import (
    ReportLimits,
    Statistics,
    host_of,
    measure,
    measure_shard,
    merge,
    merge_all,
    shares,
)
from pipeline.stages.report.scales import SCALES
from pipeline.stages.shard_tasks import Workers

HERE = Workers(processes_count=0)
Make = Callable[..., Snapshot]


def publish_again(snapshot: Snapshot, shards, **changed) -> Snapshot:
    """The snapshot's folder with other shards."""
    settings = {"rows": snapshot.rows, "dropped": snapshot.dropped, "changes": {}, **changed}
    return publish_shards(
        Folder(snapshot.folder), tuple(shards), fields=snapshot.fields, card=None, options={}, **settings
    )


def failed_rows(snapshot: Snapshot, rows: list[dict[str, object]]) -> None:
    """Give the first shard a parquet file."""
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, Path(snapshot.folder) / f"{snapshot.shards[0].name}.parquet")


def test_counts_sizes_and_captions(make_snapshot: Make) -> None:
    snapshot = make_snapshot((7, 5, 8))
    measured = measure(snapshot, ReportLimits(samples=6), HERE)
    samples = [one for shard in snapshot.shards for one in read_samples(Folder(snapshot.folder), shard)]
    assert (measured.shards, measured.visible, measured.unique, measured.unreadable) == (3, 20, 20, 0)
    words = [len(one.fields["txt"].split()) for one in samples]
    sizes = [len(one.fields["jpg"]) for one in samples]
    histogram = measured.histograms["words"]
    assert histogram.bins == {length: words.count(length) for length in sorted(set(words))}
    assert histogram.mean == pytest.approx(reference.mean(words))
    assert (histogram.least, histogram.most) == (min(words), max(words))
    assert measured.bytes == sum(sizes) and measured.histograms["bytes"].mean == pytest.approx(reference.mean(sizes))
    assert measured.histograms["width"].most == 72 and measured.histograms["aspect"].mean == 1


@pytest.mark.parametrize("name", SCALES)
def test_bins_tile_their_scale(name: str) -> None:
    scale = SCALES[name]
    values = np.random.default_rng(0).uniform(scale.low, scale.high, 500)
    for value in values:
        number = scale.bin(float(value))
        assert scale.edge(number) <= value * (1 + 1e-9) + 1e-9 and value <= scale.edge(number + 1) * (1 + 1e-9)
    assert scale.bin(-1e9) == 0 and scale.bin(1e12) == scale.bin(scale.high)
    assert scale.edge(0) == pytest.approx(scale.low)


def test_quantiles_are_right_to_within_a_bin() -> None:
    values = np.random.default_rng(1).lognormal(6, 1, 5000).clip(10, 30000)
    bins = dataset_statistics._Bins("width")
    for value in values:
        bins.add(float(value))
    for share in (0.05, 0.5, 0.95):
        found = bins.histogram().quantile(share, SCALES["width"])
        assert found == pytest.approx(np.quantile(values, share), rel=2 ** (1 / 8) - 1)


def test_any_order_gives_the_same_and_so_does_json(make_snapshot: Make) -> None:
    from pipeline.config import from_json, to_json

    options = ReportLimits(samples=5, thumbnail_size=32)
    snapshot = make_snapshot((4, 3, 5))
    failed_rows(
        snapshot, [{"key": f"{n}", "status": "failed_to_download", "url": f"http://h{n % 3}/"} for n in range(9)]
    )
    folder, limits = Folder(snapshot.folder), shares(snapshot, options)
    parts = [measure_shard(folder, shard, options, limits) for shard in snapshot.shards]
    results = [
        reduce(lambda a, b: merge(a, b, options.samples), order, Statistics())
        for order in itertools.permutations(parts)
    ]
    pairs = merge(parts[0], merge(parts[1], parts[2], 5), 5)
    assert all(to_json(result) == to_json(results[0]) for result in [*results, merge(pairs, Statistics(), 5)])
    assert merge_all(iter(parts), 5) == results[0] and merge_all([], 5) == Statistics()
    assert from_json(Statistics, to_json(results[0])) == results[0]


def test_ray_gives_what_this_process_gives(make_snapshot: Make, ray_cluster) -> None:
    snapshot = make_snapshot((7, 5, 8))
    assert measure(snapshot, ReportLimits(), Workers(processes_count=2)) == measure(snapshot, ReportLimits(), HERE)


def test_samples_do_not_depend_on_how_shards_are_cut(make_snapshot: Make) -> None:
    options = ReportLimits(samples=4)
    snapshot = make_snapshot((9, 9))
    halves = [select(Folder(snapshot.folder), snapshot.shards[0], np.arange(9) % 2 == half) for half in (0, 1)]
    limits = shares(snapshot, options)
    parts = [measure_shard(Folder(snapshot.folder), shard, options, limits) for shard in halves]
    whole = measure_shard(Folder(snapshot.folder), snapshot.shards[0], options, limits)
    assert merge(parts[1], parts[0], 4).samples == whole.samples
    other = measure_shard(Folder(snapshot.folder), snapshot.shards[0], replace(options, seed=1), limits)
    assert [one.key for one in other.samples] != [one.key for one in whole.samples]
    with Image.open(io.BytesIO(base64.b64decode(whole.samples[0].thumbnail))) as image:
        assert image.size == (72, 72)


def test_a_large_data_set_is_looked_at_in_part(make_snapshot: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept does not grow with the data set, and hashes choose it."""
    monkeypatch.setattr(dataset_statistics, "EXACT_ROWS", 30)
    snapshot = make_snapshot((150,))
    limits = shares(snapshot, ReportLimits(samples=2))
    assert limits.images == limits.rows == 30 * 2**64 // 150
    measured = measure(snapshot, ReportLimits(samples=2), HERE)
    assert 12 <= len(measured.images) <= 55 and len(measured.samples) == 2
    everything = replace(limits, shown=2**64)
    first = measure_shard(Folder(snapshot.folder), snapshot.shards[0], ReportLimits(samples=2), everything).samples
    assert measured.samples == first, "the pre-selection has to hold the smallest hashes"


def test_repeated_samples_are_seen_twice_and_are_no_duplicates(make_snapshot: Make) -> None:
    snapshot = make_snapshot((6,))
    picked = select(Folder(snapshot.folder), snapshot.shards[0], np.array([0, 0, 0, 2, 5]))
    again = publish_again(snapshot, [picked])
    measured = measure(again, ReportLimits(), HERE)
    assert (measured.visible, measured.unique, len(measured.samples)) == (5, 3, 3)
    assert {copies.count for copies in measured.images.values()} == {1}
    way = funnel(again, measured)
    assert (way.kept, way.visible, way.repeated) == (3, 3, 2)
    assert [(one.name, one.count) for one in way.reasons] == [(UNRECORDED, 3)]


def test_equal_images_are_found_across_shards(make_snapshot: Make) -> None:
    plain = make_snapshot((3, 3))
    same = next(read_samples(Folder(plain.folder), plain.shards[0])).fields
    snapshot = make_snapshot((3, 3), spoil={4: same, 5: same})
    groups = [one for one in measure(snapshot, ReportLimits(), HERE).images.values() if one.count > 1]
    assert [(one.count, one.keys) for one in groups] == [(3, ("0000000", "0000101", "0000102"))]


def test_rows_hosts_and_messages(make_snapshot: Make) -> None:
    snapshot = make_snapshot((4,))
    rows = [
        {"key": f"a{n}", "status": "success", "url": "https://Good.example/x", "original_width": 300} for n in range(4)
    ]
    rows += [{"key": f"b{n}", "status": "failed_to_download", "url": "http://bad.example/"} for n in range(50)]
    rows += [{"key": "c", "status": "failed_to_resize", "url": "http://[broken", "error_class": "empty"}]
    rows += [{"key": "d", "status": "failed_to_download", "url": "", "error_class": "empty"}]
    shuffled = random.Random(0).sample(rows, len(rows))
    failed_rows(
        snapshot,
        [
            {"error_class": None, "error_message": "no", "original_width": None, "original_height": 200, **row}
            for row in shuffled
        ],
    )
    measured = measure(snapshot, ReportLimits(), HERE)
    assert measured.reasons == {
        "failed_to_download/failed_to_download": 50,
        "failed_to_resize/empty": 1,
        "failed_to_download/empty": 1,
    }
    assert len(measured.messages["failed_to_download/failed_to_download"]) == 3
    found = {name: (host.rows, host.successes) for name, host in measured.hosts.items()}
    assert found == {"good.example": (4, 4), "bad.example": (50, 0), "": (1, 0)}
    assert measured.histograms["original"].count == 4 and measured.histograms["original"].most == 200


def test_hosts_of_strange_urls() -> None:
    assert [host_of(url) for url in ("http://[::1]:80/", "nonsense", "http://[x", "//Ä.example/")] == [
        "::1",
        "",
        "",
        "ä.example",
    ]


def test_scores_and_languages_come_from_sidecars(make_snapshot: Make) -> None:
    snapshot = make_snapshot((4,))
    folder, shard = Folder(snapshot.folder), snapshot.shards[0]
    keys = [one.key for one in read_samples(folder, shard)]
    images = np.eye(4, 8, dtype=np.float16)
    texts = images[[0, 0, 2, 2]] * np.float16(0.6) + np.eye(8, dtype=np.float16)[[7] * 4] * np.float16(0.8)
    table = pa.table({"key": keys, "image": list(images), "text": list(texts), "language": ["en", "de", "en", None]})
    sidecars = {"embeddings": write_sidecar(folder, shard, "embeddings", table, "model")}
    again = publish_again(snapshot, [replace(shard, sidecars=sidecars)])
    measured = measure(again, ReportLimits(), HERE)
    assert measured.languages == {"en": 2, "de": 1}
    score = measured.histograms["score"]
    assert score.count == 4 and score.mean == pytest.approx(0.3, abs=1e-3)
    assert (score.least, score.most) == pytest.approx((0.0, 0.6), abs=1e-3)


def test_languages_are_identified_where_nobody_told_them(make_snapshot: Make) -> None:
    image = next(read_samples(Folder(make_snapshot((1,)).folder), make_snapshot((1,)).shards[0])).fields["jpg"]
    captions = (
        "Ein alter Mann sitzt auf einer Bank und liest die Zeitung",
        "An old man is sitting on a bench and reading the newspaper",
        "Un vieil homme est assis sur un banc et lit le journal",
        "",
    )
    spoil = {number: {"jpg": image, "txt": text.encode()} for number, text in enumerate(captions)}
    snapshot = make_snapshot((4,), spoil=spoil)
    assert measure(snapshot, ReportLimits(), HERE).languages == {"de": 1, "en": 1, "fr": 1}
    assert measure(snapshot, ReportLimits(languages=False), HERE).languages == {}


def test_a_missing_sidecar_names_the_job(make_snapshot: Make) -> None:
    snapshot = make_snapshot((2,))
    again = publish_again(snapshot, [replace(snapshot.shards[0], sidecars={"embeddings": "0" * 64})])
    with pytest.raises(DataError, match="jobs/embed_dataset.py"):
        measure(again, ReportLimits(), HERE)


def test_images_that_do_not_decode_are_counted_and_not_shown(make_snapshot: Make) -> None:
    broken = {"jpg": b"\xff\xd8\xff not an image", "txt": b"\xff\xfe"}
    measured = measure(make_snapshot((3,), spoil={1: broken, 2: {"txt": b"no image"}}), ReportLimits(), HERE)
    assert (measured.visible, measured.unreadable, len(measured.samples)) == (3, 1, 2)


def test_the_funnel_splits_reasons_by_step(make_snapshot: Make) -> None:
    snapshot = make_snapshot((10,))
    failed_rows(
        snapshot,
        [{"key": f"{n}", "status": "failed_to_resize", "url": "", "error_class": "too_large"} for n in range(3)],
    )
    kept = select(Folder(snapshot.folder), snapshot.shards[0], np.arange(10) < 6)
    # 3 of the 4 too large ones are in the shard's rows; the dns ones were in a shard without any sample.
    again = publish_again(snapshot, [kept], rows=19, dropped={"too_large": 4, "dns": 5, "caption_short": 4})
    way = funnel(again, measure(again, ReportLimits(), HERE))
    assert (way.rows, way.downloaded, way.resized, way.kept, way.visible) == (19, 14, 10, 6, 6)
    assert {(one.step, one.name, one.count) for one in way.reasons} == {
        ("failed_to_resize", "too_large", 4),
        ("failed_to_download", "dns", 5),
        ("filtered", "caption_short", 4),
    }


def test_what_changed_against_the_parent(make_snapshot: Make) -> None:
    snapshot = make_snapshot((5, 6, 4, 3))
    assert difference(snapshot) is None
    folder = Folder(snapshot.folder)
    one, two, three, four = snapshot.shards
    fewer = select(folder, two, np.array([0, 1, 1, 5]))
    rewritten = replace(three, sha256="f" * 64, samples=9)
    new = replace(four, name="00009", samples=2)
    sided = replace(one, sidecars={"phrases": "0" * 64})
    again = publish_again(snapshot, [sided, fewer, rewritten, new], changes={"removed": 3})
    change = difference(again)
    assert change is not None and change.parent == snapshot.id
    assert (change.unchanged, change.changed, change.added, change.removed) == (1, 2, 1, 1)
    # Of the second, three are hidden and one comes twice.
    assert (change.samples_added, change.samples_removed) == (1 + 9 + 2, 3 + 4 + 3)
    assert change.sidecars_added == ("phrases",) and change.recorded == {"removed": 3}


def test_a_parent_that_is_gone_is_no_error(make_snapshot: Make) -> None:
    snapshot = make_snapshot((5,))
    again = publish_again(snapshot, [select(Folder(snapshot.folder), snapshot.shards[0], np.arange(5) < 2)])
    (Path(snapshot.folder) / "_snapshots" / f"{snapshot.id}.json").unlink()
    assert difference(read_snapshot(again.uri)) is None


def test_statistics_hold_no_numpy(make_snapshot: Make) -> None:
    json.dumps(measure(make_snapshot((2,)), ReportLimits(), HERE).histograms["width"].__dict__)
