"""Rows with an image and a sound: fetched, checked, counted, encoded, renewed and purged part by part."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.codecs.audio import AudioOptions
from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.errors import SettingError
from pipeline.shards.media import AUDIO
from pipeline.shards.sample import Sample
from pipeline.shards.selection import read_samples
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import TarWriter
from pipeline.shards.verify import Verification, folder_problems
from pipeline.sources.folder import ImageFolder
from pipeline.sources.urls import UrlTable
from pipeline.sources.webdataset import WebDatasetTars
from pipeline.stages.crawl.download import DownloadOptions
from pipeline.stages.filters.view import ShardView
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.refresh.settings import Renewal
from pipeline.stages.report.dataset_statistics import ReportLimits, measure
from pipeline.stages.shard_tasks import Workers
from tests.conftest import image
from tests.jobs.conftest import Type, job  # noqa: F401  (the fixture that runs jobs)

HERE = Workers(processes_count=0)
LATEST = Renewal(parent="latest")
RATE = 16_000


def sound(number: int, kind: str = "FLAC", seconds: float = 0.5, rate: int = RATE) -> bytes:
    """A tone of a frequency of its own, of 16 bits."""
    wave = 0.4 * np.sin(2 * np.pi * (200 + 40 * number) * np.arange(round(seconds * rate)) / rate)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=None if kind == "MP3" else "PCM_16")
    return file.getvalue()


def options(**more: Any) -> ShardOptions:
    media = MediaOptions(image=ImageOptions(image_size=32), audio=AudioOptions(audio_rate=RATE))
    downloads = DownloadOptions(allow_hosts=("127.0.0.1",), timeout=5.0)
    return ShardOptions(media=media, downloads=downloads, number_sample_per_shard=10, **more)


class Site:
    """Images and sounds 0 to 5 of a table of both; ``bodies`` replace them, ``status`` is an answer's."""

    def __init__(self, folder: Path, serve: Any) -> None:
        self.bodies: dict[str, bytes] = {}
        self.status: dict[str, int] = {}
        self.tags: set[str] = set()
        self.names = [(f"{number}.jpg", f"{number}.flac") for number in range(6)]
        self.place, self.out, self._reply = folder, folder / "out", serve.Reply
        plain = {f"{n}.jpg": image(n) for n in range(9)} | {f"{n}.flac": sound(n) for n in range(9)}
        self.server = serve({name: self._answer(name, body) for name, body in plain.items()})

    def _answer(self, name: str, body: bytes) -> Any:
        def answer(_: int) -> Any:
            now = self.bodies.get(name, body)
            headers = {"ETag": f'"{hash(now)}"'} if name in self.tags else {}
            return self._reply(now, status=self.status.get(name, 200), headers=headers)

        return answer

    def url(self, name: str) -> str:
        return f"{self.server.url}/{name}" if name else ""

    def refresh(self, renewal: Renewal = LATEST, url_col: Any = ("image=url", "audio=heard"), **more: Any) -> Snapshot:
        table = self.place / "list.jsonl"
        rows = [
            {"url": self.url(a), "heard": self.url(b), "text": f"number {n}"} for n, (a, b) in enumerate(self.names)
        ]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.server.requests.clear()
        source = UrlTable(url_list=str(table), url_col=url_col, caption_col="text")
        return refresh(source, Folder(self.out), options(**more), HERE, renewal=renewal)

    def rows(self, shard: str = "00000") -> list[dict[str, Any]]:
        return list(pq.read_table(self.out / f"{shard}.parquet").to_pylist())

    def asked(self) -> list[str]:
        return sorted(path.strip("/") for path in self.server.requests)


@pytest.fixture
def site(tmp_path: Path, serve: Any) -> Site:
    return Site(tmp_path, serve)


def samples_of(snapshot: Snapshot) -> dict[str, Sample]:
    found = (sample for shard in snapshot.shards for sample in read_samples(Folder(snapshot.folder), shard))
    return {sample.fields["txt"].decode(): sample for sample in found}


def heard(body: bytes) -> tuple[Any, int]:
    samples, rate = soundfile.read(io.BytesIO(body), dtype="int16")
    return samples, rate


def test_a_sample_has_every_part(site: Site) -> None:
    snapshot = site.refresh()
    assert snapshot.samples == 6 and snapshot.fields == ("flac", "jpg", "json", "txt") and not snapshot.dropped
    for number, sample in enumerate(samples_of(snapshot).values()):
        assert np.array_equal(heard(sample.fields["flac"])[0], heard(sound(number))[0])
        described = json.loads(sample.fields["json"])
        assert described["url"].endswith(f"{number}.jpg") and described["audio_url"].endswith(f"{number}.flac")
        assert described["width"] == 32 and described["audio_rate"] == RATE
        assert described["audio_seconds"] == pytest.approx(0.5)
    row = site.rows()[0]
    assert row["attempts"] == row["audio_attempts"] == 1 and row["audio_error_class"] is None
    assert row["sha256"] != row["audio_sha256"] and len(row["audio_sha256"]) == 64
    assert not list(Verification(snapshot=snapshot).problems(snapshot.shards[0]))
    assert not folder_problems(Folder(snapshot.folder), snapshot)


def broken(site: Site) -> None:
    """A missing sound, a page in place of a sound, a missing image, both missing, a truncated sound."""
    site.status |= {"0.flac": 404, "2.jpg": 503, "3.jpg": 404, "3.flac": 404}
    site.bodies |= {"1.flac": b"<!doctype html><p>gone", "4.flac": sound(4)[:60]}


def test_a_row_fails_with_one_of_its_parts(site: Site) -> None:
    broken(site)
    snapshot = site.refresh()
    assert list(samples_of(snapshot)) == ["number 5"]
    rows = site.rows()
    assert [(row["error_class"], row["http_status"]) for row in rows[:4]] == [
        ("http_4xx", 404),
        ("not_a_sound", 200),
        ("http_5xx", 503),
        ("http_4xx", 404),
    ]
    assert [row["image_error_class"] for row in rows] == [None, None, "http_5xx", "http_4xx", None, None]
    classes = [row["audio_error_class"] for row in rows]
    assert classes[:4] == ["http_4xx", "not_a_sound", None, "http_4xx"] and classes[4] and classes[5] is None
    damaged = classes[4]
    assert snapshot.dropped == {
        "audio:http_4xx": 1,
        "audio:not_a_sound": 1,
        "image:http_5xx": 1,
        "image:http_4xx": 1,
        f"audio:{damaged}": 1,
    }
    stats = json.loads((site.out / "00000_stats.json").read_bytes())
    assert stats["failed_parts"] == {
        "image": {"http_5xx": 1, "http_4xx": 1},
        "audio": {"http_4xx": 2, "not_a_sound": 1, damaged: 1},
    }
    assert sum(stats["reasons"].values()) == stats["count"] - stats["successes"]


def test_a_row_may_keep_its_other_parts(site: Site) -> None:
    broken(site)
    snapshot = site.refresh(failed_part="keep-row")
    found = {text: set(sample.fields) & {"jpg", "flac"} for text, sample in samples_of(snapshot).items()}
    assert found == {
        "number 0": {"jpg"},
        "number 1": {"jpg"},
        "number 2": {"flac"},
        "number 4": {"jpg"},
        "number 5": {"jpg", "flac"},
    }
    assert snapshot.dropped == {"image:http_4xx": 1}
    row = site.rows()[2]
    assert row["status"] == "success" and row["width"] is None and row["image_error_class"] == "http_5xx"
    assert not list(Verification(snapshot=snapshot).problems(snapshot.shards[0]))
    # A row that kept its other parts is done: nothing is asked for again.
    assert site.refresh(failed_part="keep-row") == snapshot and site.asked() == []
    with pytest.raises(SettingError, match="failed_part"):
        site.refresh()


def test_a_row_without_a_url_of_one_medium_has_the_other_part(site: Site) -> None:
    site.names[:3] = [("0.jpg", ""), ("", "1.flac"), ("", "")]
    snapshot = site.refresh()
    found = samples_of(snapshot)
    assert set(found["number 0"].fields) & {"jpg", "flac"} == {"jpg"}
    assert set(found["number 1"].fields) & {"jpg", "flac"} == {"flac"}
    assert snapshot.dropped == {"image:bad_url": 1}
    rows = site.rows()
    assert rows[1]["url"] == rows[1]["audio_url"] == site.url("1.flac") and rows[1]["sha256"] is None
    assert site.refresh() == snapshot


def test_a_table_of_sounds_has_their_url_as_its_own(site: Site) -> None:
    snapshot = site.refresh(url_col="audio=heard")
    assert snapshot.fields == ("flac", "json", "txt") and snapshot.samples == 6
    rows = site.rows()
    assert rows[0]["url"] == site.url("0.flac") and "audio_url" not in rows[0] and rows[0]["audio_seconds"] == 0.5
    site.status["7.flac"] = 404
    site.names.append(("", "7.flac"))
    renewed = site.refresh(url_col="audio=heard")
    assert site.asked() == ["7.flac"] and renewed.dropped == {"http_4xx": 1} and renewed.samples == 6


def test_a_renewal_sees_the_url_of_every_part(site: Site) -> None:
    first = site.refresh()
    assert site.refresh() == first and site.asked() == []
    site.names[2] = ("2.jpg", "8.flac")
    second = site.refresh()
    assert site.asked() == ["2.jpg", "8.flac"] and second.changes["changed"] == 1 and second.samples == 6
    stored = samples_of(second)["number 2"].fields["flac"]
    assert np.array_equal(heard(stored)[0], heard(sound(8))[0])


def test_a_part_on_the_opt_out_list_hides_its_row(site: Site, tmp_path: Path) -> None:
    first = site.refresh()
    listed = tmp_path / "out.txt"
    listed.write_text(f"{site.url('3.flac')}\n{site.rows()[4]['audio_sha256']}\n")
    second = site.refresh(Renewal(parent="latest", opt_out=str(listed), purge=True))
    assert sorted(samples_of(second)) == ["number 0", "number 1", "number 2", "number 5"]
    assert second.dropped == {"opt_out": 2} and site.asked() == []
    purged = site.rows(second.shards[0].name)
    assert [row["status"] for row in purged] == ["success"] * 3 + ["failed_to_download"] * 2 + ["success"]
    assert purged[3]["audio_sha256"] is None and purged[3]["audio_seconds"] is None
    assert not list(Verification(snapshot=second).problems(second.shards[0]))
    assert first.samples == 6 and not folder_problems(Folder(second.folder), second)


def test_failed_parts_are_fetched_again(site: Site) -> None:
    site.status |= {"1.flac": 503, "2.flac": 404}
    first = site.refresh()
    assert first.dropped == {"audio:http_5xx": 1, "audio:http_4xx": 1}
    site.status.clear()
    second = site.refresh(Renewal(parent="latest", retry_failed=True))
    assert site.asked() == ["1.flac", "1.jpg"] and second.samples == 5 and second.dropped == {"audio:http_4xx": 1}


def test_a_sound_that_has_changed_at_its_url_is_fetched_again(site: Site) -> None:
    site.tags |= {"1.flac", "2.jpg", "3.flac"}
    site.refresh()
    site.bodies["3.flac"] = sound(40)
    known = Renewal(parent="latest", revalidate="known")
    second = site.refresh(known)
    assert site.asked() == ["1.flac", "2.jpg", "3.flac", "3.flac", "3.jpg"] and second.changes["changed"] == 1
    assert np.array_equal(heard(samples_of(second)["number 3"].fields["flac"])[0], heard(sound(40))[0])
    site.bodies["1.flac"] = b"<!doctype html><p>An error that is not one of HTTP"
    assert site.refresh(known) == second, "no sound at all: the stored one stays"


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (("image=url", "image=heard"), "each medium once"),
        (("url", "audio=heard"), "a column, or MEDIUM=COLUMN"),
        (("image=url", "audio="), "each medium once"),
        ((), "a column, or"),
        (("image=url", "audio=nothing"), "a column of the table"),
    ],
)
def test_columns_that_make_no_sense_are_refused(site: Site, columns: tuple[str, ...], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        site.refresh(url_col=columns)


def files_in(folder: Path) -> Path:
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(image(number))
        (folder / f"{number}.flac").write_bytes(sound(number))
        (folder / f"{number}.txt").write_text(f"number {number}")
    (folder / "1.jpg").unlink()
    return folder


def test_files_of_one_name_are_one_row(tmp_path: Path) -> None:
    source = ImageFolder(folder=str(files_in(tmp_path / "in")), media=("image", "audio"))
    out = Folder(tmp_path / "out")
    first = refresh(source, out, options(), HERE)
    found = {text: set(sample.fields) & {"jpg", "flac"} for text, sample in samples_of(first).items()}
    assert found == {"number 0": {"jpg", "flac"}, "number 1": {"flac"}, "number 2": {"jpg", "flac"}}
    assert refresh(source, out, options(), HERE, renewal=LATEST) == first
    (tmp_path / "in" / "2.flac").write_bytes(sound(30))
    second = refresh(ImageFolder(folder=source.folder, media=source.media), out, options(), HERE, renewal=LATEST)
    assert second.changes["changed"] == 1 and second.changes["kept"] == 2
    assert np.array_equal(heard(samples_of(second)["number 2"].fields["flac"])[0], heard(sound(30))[0])
    only = refresh(ImageFolder(folder=source.folder), Folder(tmp_path / "images"), options(), HERE)
    assert only.samples == 2 and "flac" not in only.fields


def test_sounds_of_tars_stay_as_they_are(tmp_path: Path) -> None:
    first = refresh(
        ImageFolder(folder=str(files_in(tmp_path / "in")), media=("audio",)), Folder(tmp_path / "a"), options(), HERE
    )
    tars = WebDatasetTars(tars=str(tmp_path / "a"), media=("audio",))
    media = MediaOptions(audio=AudioOptions(**tars.audio_options))
    second = refresh(tars, Folder(tmp_path / "b"), ShardOptions(media=media), HERE)
    before, after = samples_of(first), samples_of(second)
    assert {text: one.fields["flac"] for text, one in before.items()} == {
        text: one.fields["flac"] for text, one in after.items()
    }
    with pytest.raises(Exception, match="--media audio"):
        refresh(WebDatasetTars(tars=str(tmp_path / "a")), Folder(tmp_path / "c"), ShardOptions(), HERE)
    assert read_snapshot(str(tmp_path / "b")).samples == 3


def test_an_unknown_medium_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="media"):
        ImageFolder(folder=str(tmp_path), media=("scent",))


def laion_tars(folder: Path) -> Folder:
    """Tars of LAION's audio-dataset: flac and json with a list of captions, and sizes.json."""
    folder.mkdir()
    sizes = {}
    for tar in range(2):
        with open(folder / f"{tar}.tar", "wb") as file:
            writer = TarWriter(file)
            for index in range(3):
                text = json.dumps({"text": [f"the sound of {index}", "another"], "tag": ["x"], "original_data": {}})
                body = sound(3 * tar + index, seconds=0.4 + index, rate=48_000)
                fields = {"flac": body, "json": text.encode()}
                writer.write(Sample(str(index + 1), fields))
            writer.close()
        sizes[f"{tar}.tar"] = 3
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return Folder(folder)


def test_tars_of_laion_are_adopted_verified_and_reported(
    job: Type,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = laion_tars(tmp_path / "clap")
    assert job("adopt_dataset", "folder", folder.uri, "--processes-count", "0") == 0
    snapshot = read_snapshot(folder.uri)
    assert snapshot.fields == ("flac", "json") and snapshot.samples == 6
    verify = ("verify_dataset", "snapshot", folder.uri, "--decode", "--processes-count", "0")
    assert job(*verify) == 0
    view = ShardView(folder, snapshot.shards[0])
    assert view.captions() == [f"the sound of {index}" for index in range(3)]
    assert view.column("audio_seconds") == pytest.approx([0.4, 1.4, 2.4])
    assert [body is not None for body in view.bodies(AUDIO)] == [True] * 3
    page = tmp_path / "report.html"
    words = ("--data", folder.uri, "--output", str(page), "--processes-count", "0", "--no-track")
    assert job("report_dataset", "snapshot", *words, "--sound-seconds", "1") == 0
    text = page.read_text()
    players = re.findall(r'<audio controls[^>]*src="data:audio/flac;base64,([^"]+)"', text)
    assert len(players) == 6 and "media-src data:" in text
    lengths = sorted(len(soundfile.read(io.BytesIO(base64.b64decode(one)))[0]) for one in players)
    assert lengths == [6_400, 6_400, 16_000, 16_000, 16_000, 16_000], "a second of each, at 16 kHz"
    assert "Duration of sounds" in text and "Sampling rate" in text
    tar = tmp_path / "clap" / "0.tar"
    tar.write_bytes(tar.read_bytes().replace(b"fLaC", b"fLaX", 1))
    capsys.readouterr()
    assert job(*verify) == 1
    assert "1 samples whose audio cannot be decoded" in capsys.readouterr().out


def test_a_report_measures_and_plays_what_was_stored(site: Site) -> None:
    snapshot = site.refresh()
    found = measure(snapshot, ReportLimits(), HERE)
    assert found.histograms["seconds"].count == 6 and found.histograms["seconds"].mean == pytest.approx(0.5)
    assert found.histograms["channels"].mean == 1 and found.histograms["rate"].mean == RATE
    # A sine of amplitude 0.4 has a root mean square of 0.4 / sqrt(2).
    assert found.histograms["loudness"].mean == pytest.approx(20 * np.log10(0.4 / np.sqrt(2)), abs=0.1)
    assert all(shown.sound and shown.thumbnail for shown in found.samples)
    assert not any(one.sound for one in measure(snapshot, ReportLimits(sound_seconds=0), HERE).samples)


def test_equal_images_with_other_sounds_are_no_duplicates(site: Site) -> None:
    site.bodies |= {"1.jpg": image(0), "2.jpg": image(0), "2.flac": sound(0)}
    view = ShardView(Folder(site.out), site.refresh().shards[0])
    digests = view.digests()
    assert len(set(digests)) == 5 and digests[0] == digests[2] != digests[1]
