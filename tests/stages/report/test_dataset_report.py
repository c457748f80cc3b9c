"""The report page of a snapshot: hostile text is escaped, no requests are made, and its numbers are right."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.shards.sample import Sample
from pipeline.shards.selection import select
from pipeline.shards.snapshot import Snapshot, publish_shards
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.pseudo_box_maker import PseudoBoxOptions, make_pseudo_boxes
from pipeline.stages.annotate.pseudo_boxes import read_counts
from pipeline.stages.report.dataset_report import make_report, plain, report_page
from pipeline.stages.report.dataset_statistics import ReportLimits, measure
from pipeline.stages.shard_tasks import Workers
from tests.grounded import WordPhrases, jpeg, load_letters, publish

Make = Callable[..., Snapshot]
EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "\u202eesrever\u202c \u2066x",
    "a\x00b\x1b[31mred\x7f",
    "</title></style></figure><iframe src=//evil.example>",
    "word " * 5000,
    "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
)
# The elements that the page is made of; none of them runs or fetches anything.
ELEMENTS = set(
    "html head meta title style body main header section h1 h2 h3 p dl div dt dd table caption thead tbody tr th td "
    "figure figcaption svg rect line text polygon img bdi small em strong ul li details summary".split()
)


class Page(HTMLParser):
    """What a browser would see: elements, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag.lower(), {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "img"):
            self.open.append(tag.lower())

    def handle_endtag(self, tag: str) -> None:
        if tag.lower() != "title" or "svg" not in self.open:
            assert self.open[-1] == tag.lower(), f"{self.open[-3:]} closed by {tag}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""


def page_of(snapshot: Snapshot, **options: int) -> str:
    measuring = ReportLimits(**options)
    statistics = measure(snapshot, measuring, Workers(processes_count=0))
    return report_page(make_report(snapshot, statistics, measuring))


@pytest.fixture(scope="module")
def hostile(make_snapshot: Make) -> str:
    """The page of a snapshot in which every word from outside is an attack."""
    import simplejpeg

    def fields(number: int) -> dict[str, bytes]:
        image = simplejpeg.encode_jpeg(np.full((40, 60, 3), 200 - number % 3, np.uint8))
        label = EVIL[number % len(EVIL)].replace('"', "'").replace("\x00", "").replace("\x1b", "").replace("\x7f", "")
        boxes = f'{{"objects": [{{"label": "{label}", "bbox": [1, 2, 30, 20]}}]}}'
        return {"jpg": image, "txt": EVIL[number % len(EVIL)].encode(), "boxes.json": boxes.encode()}

    snapshot = make_snapshot((12,), spoil={number: fields(number) for number in range(12)})
    rows = [
        {
            "key": str(number),
            "status": "failed_to_download",
            "error_class": "<b>class</b>" if number % 2 else "dns",
            "error_message": evil,
            "url": f"http://<i>{number}</i>.example/{evil}",
        }
        for number, evil in enumerate(EVIL)
    ]
    pq.write_table(pa.Table.from_pylist(rows), Path(snapshot.folder) / "00000.parquet")
    hidden = publish_shards(
        Folder(snapshot.folder),
        (select(Folder(snapshot.folder), snapshot.shards[0], np.arange(12) < 11),),
        fields=("jpg", "<script>"),
        card="<script>card</script>",
        options={"source": {"url_list": "s3://user:hunter2@host/<x>"}, "<b>": "</table>"},
        rows=20,
        dropped={"<b>class</b>": 4, "dns": 4, "<u>": 1},
        changes={"<u>removed": 1},
    )
    return page_of(hidden)


def test_no_word_from_outside_becomes_markup(hostile: str) -> None:
    page = Page(hostile)
    assert {name for name, _ in page.elements} <= ELEMENTS
    attributes = {name for _, found in page.elements for name in found}
    assert not [name for name in attributes if name.startswith("on") or name in ("href", "xlink:href", "srcset")]
    assert page.open == []
    assert "<script>alert(1)</script>" in page.text, "shown as text"
    assert "hunter2" not in hostile


def test_nothing_is_fetched(hostile: str) -> None:
    page = Page(hostile)
    sources = [found["src"] for _, found in page.elements if "src" in found]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    policies = [found["content"] for name, found in page.elements if name == "meta" and "http-equiv" in found]
    assert policies[0].startswith("default-src 'none'") and "script-src" not in policies[0]
    style = re.search(r"<style>(.*?)</style>", hostile, re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1] and "prefers-color-scheme" in style[1]


def test_nothing_steers_the_display(hostile: str) -> None:
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", hostile)
    hostile.encode("utf-8")
    assert len(hostile) < 300_000, "long captions are cut"


def test_the_page_can_be_read_without_seeing_it(hostile: str) -> None:
    page = Page(hostile)
    assert all(found.get("alt") for name, found in page.elements if name == "img")
    tables = [name for name, _ in page.elements if name == "table"]
    assert len(tables) == len([name for name, _ in page.elements if name == "caption"]) > 5
    charts = [found for name, found in page.elements if name == "svg" and "chart" in found.get("class", "")]
    assert charts and all(found["role"] == "img" and "median" in found["aria-label"] for found in charts)
    assert [name for name, _ in page.elements].count("h1") == 1
    assert page.elements[0][1] == {"lang": "en"}


def test_what_it_says(hostile: str) -> None:
    text = " ".join(Page(hostile).text.split())
    for words in ("samples11", "input rows20100.0 %", "downloaded12", "visible to readers11", "not downloaded"):
        assert words in text, words
    assert "There is no earlier" not in text and "samples removed1" in text
    # 11 one-coloured images in three greys.
    assert "8 of 11 images" in text and "in groups: 3" in text


def test_boxes_lie_over_the_images(hostile: str) -> None:
    boxes = [found for name, found in Page(hostile).elements if name == "rect" and found.get("class") == "box"]
    assert boxes and boxes[0]["x"] == f"{1 / 60:.4f}" and boxes[0]["height"] == "0.5000"


def test_the_same_snapshot_gives_the_same_page(make_snapshot: Make) -> None:
    snapshot = make_snapshot((5, 6))
    assert page_of(snapshot) == page_of(snapshot) != page_of(snapshot, seed=1)


def test_a_first_snapshot_without_rows_or_sidecars(make_snapshot: Make) -> None:
    page = page_of(make_snapshot((3,)), samples=0)
    assert "There is no earlier snapshot." in page and "No row was dropped." in page
    assert "No sample can be shown." in page and "CLIP score" not in page


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("two\nli\t\u2028 nes", "two li nes"),
        ("\u202ea\u200fb", "\ufffda\ufffdb"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("\U000e0041\ue000\ud800x", "\ufffd\ufffd\ufffdx"),
        ("x" * 50, "x" * 9 + "\u2026"),
        ("", ""),
    ],
)
def test_plain(given: str, shown: str) -> None:
    assert plain(given, 10) == shown


def test_pseudo_boxes_are_counted_and_shown(tmp_path: Path) -> None:
    """In a section of their own for each sidecar; the words of captions are no markup."""
    caption = "a <b>red</b> dog"
    samples = [Sample(f"0000{number}", {"jpg": jpeg(), "txt": caption.encode()}) for number in range(2)]
    snapshot = publish(tmp_path, samples)
    annotated = make_pseudo_boxes(snapshot, load_letters, WordPhrases(), PseudoBoxOptions(), Workers(processes_count=0))
    page = page_of(annotated)
    counts = read_counts(Folder(str(tmp_path)), annotated.shards[0])
    assert "Pseudo boxes: boxes" in page and f">{counts.found / counts.phrases:.1%}<".replace("%", " %") in page
    assert "&lt;b&gt;red&lt;/b&gt; 1.00" in page and "<b>red" not in page and 'class="box"' in page
    assert "Pseudo boxes" not in page_of(snapshot)
