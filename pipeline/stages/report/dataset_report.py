"""A snapshot as one HTML page: funnel, histograms, samples with boxes, duplicates, differences, hosts.

The page is self-contained: charts are inline SVG, images inline JPEG, sounds inline FLAC, videos inline MP4, without
scripts and links, and its content security policy forbids all other requests. Captions, urls, labels and error messages
are untrusted: :func:`plain` reduces them to one line of text, and they are escaped.
"""

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.shards.media import AUDIO, MEDIA, POINTS, VIDEO, Medium
from pipeline.shards.privacy import masked
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.pseudo_boxes import BINS, PseudoBoxCounts
from pipeline.stages.report.dataset_funnel import (
    DOWNLOAD,
    FILTER,
    RESIZE,
    Funnel,
    Reason,
    SnapshotDifference,
    difference,
    funnel,
)
from pipeline.stages.report.dataset_statistics import (
    EXACT_ROWS,
    Copies,
    Histogram,
    Message,
    ReportLimits,
    ShownSample,
    Statistics,
    representative,
    shares,
)
from pipeline.stages.report.pseudo_boxes import pseudo_box_counts
from pipeline.stages.report.scales import SCALES

GROUPS, HOSTS, REASONS, LANGUAGES = 8, 25, 40, 15
MOST_BARS = 40
TALLEST = 1.5
JOINERS = "\u200c\u200d"  # Persian, Indic scripts and emoji need them
STEPS = {DOWNLOAD: "not downloaded", RESIZE: "not decoded or resized", FILTER: "filtered or hidden"}
POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --raised: #f4f6f8; --ink: #1c2430; --faint: #56616f;
  --line: #d5dbe2; --bar: #2563a8; --loss: #b4491f; --mark: #ffd400; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161c; --raised: #1b2129; --ink: #e6eaf0; --faint: #9aa6b4;
  --line: #333c48; --bar: #6aa9e9; --loss: #e58a5f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1440px; margin: 0 auto; padding: 1rem clamp(0.8rem, 3vw, 2.5rem) 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.6rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 0.6rem; padding-top: 0.6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 0.2rem; }
p { max-width: 75ch; margin: 0.4rem 0; }
.faint, small { color: var(--faint); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 0.6rem; margin: 1rem 0; }
.facts div { background: var(--raised); border-radius: 8px; padding: 0.6rem 0.8rem; }
.facts dt { color: var(--faint); font-size: 0.85rem; }
.facts dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
table:not(:has(.meter)) { max-width: 60rem; }
caption { text-align: left; color: var(--faint); padding: 0.3rem 0; }
th, td { text-align: left; padding: 0.3rem 0.7rem 0.3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
bdi { overflow-wrap: anywhere; }
th { font-weight: 600; }
th bdi { overflow-wrap: break-word; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.meter { width: 40%; min-width: 5rem; }
.meter div { height: 0.9rem; margin-top: 0.25rem; border-radius: 3px; background: var(--bar); min-width: 1px; }
.meter .loss { background: var(--loss); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.charts figure, .samples figure { margin: 0; background: var(--raised); border-radius: 8px; padding: 0.7rem; }
svg.chart { width: 100%; height: auto; display: block; }
.chart rect { fill: var(--bar); }
.chart line { stroke: var(--line); }
.chart text { fill: var(--faint); font: 10px system-ui, sans-serif; }
figcaption { font-size: 0.85rem; color: var(--faint); overflow-wrap: anywhere; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 11.5rem), 1fr)); gap: 0.8rem; }
.samples .words { color: var(--ink); margin: 0.4rem 0 0.2rem; max-height: 7.6em; overflow: hidden; }
.image { position: relative; margin: 0 auto; overflow: hidden; background: #808080; border-radius: 4px; }
.image img { width: 100%; height: auto; display: block; }
.samples audio { width: 100%; display: block; margin-top: 0.4rem; }
.samples video { width: 100%; display: block; background: #000000; border-radius: 4px; }
.image svg { position: absolute; inset: 0; width: 100%; height: 100%;
  filter: drop-shadow(0 0 1px #000000); }
.box, .outline { fill: none; stroke: var(--mark); stroke-width: 2; vector-effect: non-scaling-stroke; }
.outline { fill: var(--mark); fill-opacity: 0.25; stroke-width: 1; }
.labels { display: flex; flex-wrap: wrap; gap: 0.25rem; margin: 0.3rem 0; padding: 0; list-style: none; }
.labels li { border: 1px solid var(--line); border-radius: 4px; padding: 0 0.35rem; font-size: 0.8rem; }
details { margin: 0.4rem 0; font-size: 0.85rem; }
summary { cursor: pointer; color: var(--faint); }
@media (max-width: 30rem) { .meter { display: none; } .samples { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  table { font-size: 0.85rem; } th, td { padding-right: 0.45rem; } }
"""


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """The content of the page."""

    snapshot: Snapshot
    statistics: Statistics
    funnel: Funnel
    difference: SnapshotDifference | None
    groups: tuple[tuple[Copies, ShownSample | None], ...]
    pseudo_boxes: Mapping[str, PseudoBoxCounts]
    exact_images: bool
    exact_rows: bool


def make_report(snapshot: Snapshot, statistics: Statistics, options: ReportLimits) -> DatasetReport:
    """Collect the content of the page besides the statistics: the largest groups of duplicates and the parent.

    Raises:
        DataError: a shard or a selection is missing or damaged.
    """
    limits = shares(snapshot, options)
    repeated = (copies for copies in statistics.images.values() if copies.count > 1)
    groups = sorted(repeated, key=lambda copies: (-copies.count, copies.keys))[:GROUPS]
    shown = _first_of_each(snapshot, groups, options)
    return DatasetReport(
        snapshot=snapshot,
        statistics=statistics,
        funnel=funnel(snapshot, statistics),
        difference=difference(snapshot),
        groups=tuple((copies, shown.get(copies.keys[0])) for copies in groups),
        pseudo_boxes=pseudo_box_counts(snapshot),
        exact_images=limits.images == 2**64,
        exact_rows=limits.rows == 2**64,
    )


def report_page(report: DatasetReport) -> str:
    """The whole page as HTML text; the same report gives the same text."""
    snapshot = report.snapshot
    name = snapshot.card or snapshot.folder.rstrip("/").rsplit("/", 1)[-1]
    parts = [
        _heading(name, report),
        _funnel_section(report.funnel, report.statistics.messages),
        _charts_section(report.statistics),
        _pseudo_boxes_section(report.pseudo_boxes),
        _samples_section(report.statistics),
        _duplicates_section(report),
        _difference_section(snapshot, report.difference),
        _hosts_section(report),
        _made_with_section(snapshot),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(name, 100)}: data set report</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{''.join(parts)}</main></body></html>\n"
    )


def plain(text: str, longest: int = 400) -> str:
    """``text`` on one line, at most ``longest`` characters, without control characters.

    Controls, direction marks, lone surrogates and unassigned characters become U+FFFD. Not escaped yet.
    """
    shown = []
    for letter in text[: 4 * longest]:
        kind = unicodedata.category(letter)
        if letter.isspace() or kind in ("Zl", "Zp"):
            shown.append(" ")
        else:
            shown.append("\ufffd" if kind[0] == "C" and letter not in JOINERS else letter)
    line = " ".join("".join(shown).split())
    return line if len(line) <= longest and len(text) <= 4 * longest else line[: longest - 1].rstrip() + "\u2026"


def _text(text: str, longest: int = 400) -> str:
    return html.escape(plain(text, longest), quote=True)


def _foreign(text: str, longest: int = 400) -> str:
    """Text from the web, isolated so that right-to-left text does not reorder its surroundings."""
    return f"<bdi>{_text(text, longest)}</bdi>"


def _heading(name: str, report: DatasetReport) -> str:
    snapshot, statistics = report.snapshot, report.statistics
    facts = {
        "samples" if statistics.visible == statistics.unique else "samples, with repeats": _number(statistics.visible),
        "shards": _number(len(snapshot.shards)),
        **({"images": _size(statistics.bytes)} if statistics.bytes else {}),
        **({"sounds": _size(heard)} if (heard := _medium_bytes(statistics, AUDIO)) else {}),
        **({"videos": _size(shown)} if (shown := _medium_bytes(statistics, VIDEO)) else {}),
        **({"point clouds": _size(seen)} if (seen := _medium_bytes(statistics, POINTS)) else {}),
        "fields": _number(len(statistics.fields)),
        "input rows": _number(snapshot.rows),
        "kept": _share(statistics.unique, snapshot.rows),
    }
    facts |= {"unreadable": _number(statistics.unreadable)} if statistics.unreadable else {}
    boxes = "".join(f"<div><dt>{title}</dt><dd>{value}</dd></div>" for title, value in facts.items())
    where = f"{_text(masked(snapshot.folder), 300)}, snapshot {_text(snapshot.id)}, made {_text(snapshot.created)}"
    return f'<header><h1>{_text(name, 100)}</h1><p class="faint">{where}</p><dl class="facts">{boxes}</dl></header>\n'


def _medium_bytes(statistics: Statistics, medium: Medium) -> int:
    return sum(size for name, size in statistics.field_bytes.items() if name in medium.endings)


def _funnel_section(way: Funnel, messages: Mapping[str, Sequence[Message]]) -> str:
    steps = [
        ("input rows", way.rows),
        ("downloaded", way.downloaded),
        ("decoded and resized", way.resized),
        ("kept by filters", way.kept),
        ("visible to readers", way.visible),
    ]
    rows = [
        f'<tr><th scope="row">{title}</th><td class="number">{_number(count)}</td>'
        f'<td class="number">{_share(count, way.rows)}</td>{_meter(count, way.rows)}</tr>'
        for title, count in steps
    ]
    notes = ""
    if way.repeated:
        notes += f"<p>Readers see {_number(way.repeated)} of them more than once (up-sampling).</p>"
    if way.surplus:
        notes += f"<p>{_number(way.surplus)} samples are in the shards beyond what the counted rows account for.</p>"
    table = _table("From input rows to what readers see", ("step", "#count", "#share", "~"), rows)
    return _section("From rows to samples", table + notes + _reasons(way, messages))


def _reasons(way: Funnel, messages: Mapping[str, Sequence[Message]]) -> str:
    if not way.reasons:
        return "<p>No row was dropped.</p>"
    rows = [_reason_row(reason, way.rows, messages) for reason in way.reasons[:REASONS]]
    more = way.reasons[REASONS:]
    if more:
        count = sum(reason.count for reason in more)
        rows.append(f'<tr><td>{len(more)} further reasons</td><td></td><td class="number">{_number(count)}</td></tr>')
    return _table("Why the others were dropped", ("reason", "step", "#count", "#share", "~"), rows)


def _reason_row(reason: Reason, rows: int, messages: Mapping[str, Sequence[Message]]) -> str:
    said = {plain(one.text, 200): one for one in messages.get(f"{reason.step}/{reason.name}", ())}
    examples = "".join(
        f"<li>{_foreign(text, 200)} <small>{_foreign(one.url, 120)}</small></li>" for text, one in said.items()
    )
    shown = f"<details><summary>examples</summary><ul>{examples}</ul></details>" if examples else ""
    return (
        f'<tr><th scope="row">{_foreign(reason.name, 80)}{shown}</th>'
        f"<td>{STEPS.get(reason.step, _text(reason.step, 40))}</td>"
        f'<td class="number">{_number(reason.count)}</td><td class="number">{_share(reason.count, rows)}</td>'
        f"{_meter(reason.count, rows, 'loss')}</tr>"
    )


def _charts_section(statistics: Statistics) -> str:
    counted, names = statistics.visible, [name for name in SCALES if name in statistics.histograms]
    charts = [_chart(name, statistics.histograms[name], counted) for name in names]
    languages = _languages(statistics.languages)
    return _section(
        "What the samples are like", f'<div class="charts">{"".join(charts)}</div>{_fields(statistics)}{languages}'
    )


def _fields(statistics: Statistics) -> str:
    """Number of samples per field, and its bytes."""
    rows = [
        f'<tr><th scope="row">{_foreign(name, 60)}</th><td class="number">{_number(count)}</td>'
        f'<td class="number">{_size(statistics.field_bytes[name])}</td></tr>'
        for name, count in statistics.fields.items()
    ]
    return _table("Fields of the samples", ("field", "#samples", "#size"), rows) if rows else ""


def _chart(name: str, histogram: Histogram, samples: int) -> str:
    """A histogram as bars, with a text summary, its count among ``samples``, and a collapsible table."""
    scale = SCALES[name]
    bars = _bars(histogram, name)
    tallest = max(count for _, _, count in bars)
    width, height, step = 320, 120, 320 / len(bars)
    rects = "".join(
        f'<rect x="{place * step + 0.5:.1f}" y="{height - max(108 * count / tallest, 1 if count else 0):.1f}" '
        f'width="{max(step - 1, 0.5):.1f}" height="{max(108 * count / tallest, 1 if count else 0):.1f}">'
        f"<title>{_value(low, name)} to {_value(high, name)}: {_number(count)}</title></rect>"
        for place, (low, high, count) in enumerate(bars)
    )
    marks = sorted({0, len(bars) // 2, len(bars) - 1}) if len(bars) > 2 else [0]
    labels = "".join(
        f'<text x="{0 if mark == 0 else width if mark == len(bars) - 1 else mark * step:.0f}" y="{height + 14}" '
        f'text-anchor="{"start" if mark == 0 else "end" if mark == len(bars) - 1 else "middle"}">'
        f"{_value(bars[mark][1] if mark == len(bars) - 1 and mark else bars[mark][0], name)}</text>"
        for mark in marks
    )
    quantiles = [histogram.quantile(share, scale) for share in (0.05, 0.5, 0.95)]
    words = (
        f"least {_value(histogram.least, name)}, 5 % below {_value(quantiles[0], name)}, "
        f"median {_value(quantiles[1], name)}, mean {_value(histogram.mean, name)}, "
        f"95 % below {_value(quantiles[2], name)}, most {_value(histogram.most, name)}"
    )
    rows = [
        f'<tr><td class="number">{_value(low, name)}</td><td class="number">{_value(high, name)}</td>'
        f'<td class="number">{_number(count)}</td></tr>'
        for low, high, count in bars
    ]
    numbers = _table(f"{scale.title} in {scale.unit}", ("#from", "#below", "#samples"), rows)
    return (
        f"<figure><h3>{scale.title} <small>({scale.unit})</small></h3>"
        f'<svg class="chart" viewBox="0 0 {width} {height + 20}" role="img" '
        f'aria-label="Histogram of {scale.title.lower()}: {words}">{rects}'
        f'<line x1="0" y1="{height}.5" x2="{width}" y2="{height}.5"></line>{labels}</svg>'
        f"<figcaption>{words}; {_counted(name, histogram.count, samples)}"
        f"<details><summary>numbers</summary>{numbers}</details></figcaption></figure>"
    )


def _counted(name: str, count: int, samples: int) -> str:
    """How many values a chart has, and why they are not as many as the samples."""
    if count == samples:
        return f"{_number(count)} samples"
    if name == "original":
        return f"{_number(count)} input rows that became samples; hidden samples are counted, repeats are not"
    return f"{_number(count)} of {_number(samples)} samples; the others have no such value"


def _bars(histogram: Histogram, name: str) -> list[tuple[float, float, int]]:
    """At most ``MOST_BARS`` bars, from, below and count, over the range that has values."""
    scale = SCALES[name]
    first, last = min(histogram.bins), max(histogram.bins)
    # A margin on both sides: one bar over the whole width would be meaningless.
    first, last = max(first - 1, 0), last + 1
    wide = -(-(last - first + 1) // MOST_BARS)
    bars = []
    for start in range(first, last + 1, wide):
        count = sum(histogram.bins.get(number, 0) for number in range(start, start + wide))
        bars.append((scale.edge(start), scale.edge(start + wide), count))
    return bars


def _pseudo_boxes_section(found: Mapping[str, PseudoBoxCounts]) -> str:
    """Counts and histogram of the scores of every sidecar with pseudo boxes; nothing without any."""
    return "".join(
        _section(f"Pseudo boxes: {_text(name, 40)}", _pseudo_boxes(counts)) for name, counts in found.items()
    )


def _pseudo_boxes(counts: PseudoBoxCounts) -> str:
    metrics = counts.metrics()
    facts = {
        "boxes": _number(counts.boxes),
        "boxes per caption": f"{metrics['boxes_per_caption']:.2f}",
        "the same, with a score of 0.5 or more": f"{metrics['confident_boxes_per_caption']:.2f}",
        "phrases": _number(counts.phrases),
        "phrases with a box": _share(counts.found, counts.phrases),
        "phrases beyond the teacher's token limit": _number(counts.cut),
        "boxes that fill their image": _share(counts.whole, counts.boxes),
        "images without boxes": _share(counts.without_boxes, counts.images - counts.unreadable),
        "captions without phrases": _number(counts.without_phrases),
        "unreadable images": _number(counts.unreadable),
    }
    rows = [f'<tr><th scope="row">{name}</th><td class="number">{value}</td></tr>' for name, value in facts.items()]
    bars = [
        f'<tr><td class="number">{place / BINS:.2f}</td><td class="number">{_number(count)}</td>'
        f"{_meter(count, max(counts.histogram))}</tr>"
        for place, count in enumerate(counts.histogram)
    ]
    scores = _table("Boxes by score, in bins from this score on", ("#score", "#boxes", "~"), bars)
    return _table("Counts", ("count", "#value"), rows) + scores


def _languages(languages: Mapping[str, int]) -> str:
    if not languages:
        return ""
    total = sum(languages.values())
    ranked = sorted(languages.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ranked[LANGUAGES:])
    named = [*ranked[:LANGUAGES], *([("others", rest)] if rest else [])]
    rows = [
        f'<tr><th scope="row">{_foreign(name, 40)}</th><td class="number">{_number(count)}</td>'
        f'<td class="number">{_share(count, total)}</td>{_meter(count, total)}</tr>'
        for name, count in named
    ]
    title = f"Languages of {_number(total)} captions; an identifier is often wrong about very short ones"
    return _table(title, ("language", "#samples", "#share", "~"), rows)


def _samples_section(statistics: Statistics) -> str:
    if not statistics.samples:
        return _section("Samples", "<p>No sample can be shown.</p>")
    note = f"<p>{len(statistics.samples)} samples, chosen by the hash of their keys.</p>"
    return _section(
        "Samples", f'{note}<div class="samples">{"".join(_figure(one) for one in statistics.samples)}</div>'
    )


def _figure(shown: ShownSample, note: str = "") -> str:
    caption = _foreign(shown.caption, 300) if plain(shown.caption) else "<em>no caption</em>"
    # Tall images are shown narrower, so that none fills the screen; boxes scale with the image.
    narrow = min(100.0, 100 * TALLEST * shown.width / max(shown.height, 1))
    if not shown.thumbnail:
        words = f'<figcaption><div class="words">{caption}</div>{note}{_text(shown.key, 60)}</figcaption>'
        return f"<figure>{_player(shown)}{words}</figure>"
    labels = [region.label for region in shown.regions if plain(region.label)]
    listed = "".join(f"<li>{_foreign(label, 60)}</li>" for label in labels)
    return (
        f'<figure><div class="image" style="width: {narrow:.1f}%">'
        f'<img alt="{_text(shown.caption, 150) or "image without a caption"}" '
        f'loading="lazy" width="{shown.width}" height="{shown.height}" '
        f'src="data:image/jpeg;base64,{html.escape(shown.thumbnail, quote=True)}">{_overlay(shown)}</div>'
        f"{_player(shown)}"
        f'<figcaption><div class="words">{caption}</div>'
        + (f'<ul class="labels" aria-label="objects">{listed}</ul>' if listed else "")
        + f"{note}{_text(shown.key, 60)}, {shown.width} × {shown.height}</figcaption></figure>"
    )


def _player(shown: ShownSample) -> str:
    """The controls that play the video and the sound; nothing without them."""
    title = _text(shown.caption, 150) or "sample without a caption"
    parts = ""
    if shown.video:
        poster = f"data:image/jpeg;base64,{html.escape(shown.poster, quote=True)}"
        source = f"data:video/mp4;base64,{html.escape(shown.video, quote=True)}"
        parts += (
            f'<video controls muted playsinline preload="none" aria-label="{title}" poster="{poster}" '
            f'src="{source}"></video>'
        )
    if shown.sound:
        source = f"data:audio/flac;base64,{html.escape(shown.sound, quote=True)}"
        parts += f'<audio controls preload="none" aria-label="{title}" src="{source}"></audio>'
    return parts


def _overlay(shown: ShownSample) -> str:
    """Boxes and outlines over the image, in a unit square that is stretched over it."""
    parts = []
    for region in shown.regions:
        title = f"<title>{_text(region.label, 60)}</title>"
        for outline in region.outlines:
            points = " ".join(f"{x:.4f},{y:.4f}" for x, y in zip(outline[::2], outline[1::2], strict=True))
            parts.append(f'<polygon class="outline" points="{points}">{title}</polygon>')
        if region.box:
            x, y, width, height = region.box
            place = f'x="{x:.4f}" y="{y:.4f}" width="{width:.4f}" height="{height:.4f}"'
            parts.append(f'<rect class="box" {place}>{title}</rect>')
    if not parts:
        return ""
    return f'<svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'


def _duplicates_section(report: DatasetReport) -> str:
    images = report.statistics.images
    compared = sum(copies.count for copies in images.values())
    repeated = [copies.count for copies in images.values() if copies.count > 1]
    spare = sum(repeated) - len(repeated)
    fields = dict.fromkeys(report.snapshot.fields)
    noun = next((medium.noun for medium in MEDIA.values() if medium.field_of(fields)), "an image")
    plural = noun.split()[-1] + "s"  # of "a video"
    sampled = "" if report.exact_images else f" of about {_number(EXACT_ROWS)} {plural} chosen by their hash"
    if not images:
        return _section("Duplicates", "<p>The samples have no images, sounds or videos to compare.</p>")
    if not repeated:
        return _section("Duplicates", f"<p>No two{sampled or f' {plural}'} have the same bytes.</p>")
    words = (
        f"<p>{_number(spare)} of {_number(compared)} {plural} ({_share(spare, compared)}){sampled} repeat an earlier "
        f"one byte for byte (SHA-256), in groups: {_number(len(repeated))}. The largest:</p>"
    )
    figures = "".join(
        _figure(
            shown, f"<strong>{_number(copies.count)} times</strong>, also {_text(', '.join(copies.keys[1:]), 120)}; "
        )
        for copies, shown in report.groups
        if shown
    )
    return _section("Duplicates", f'{words}<div class="samples">{figures}</div>')


def _difference_section(snapshot: Snapshot, change: SnapshotDifference | None) -> str:
    title = "Difference to the parent"
    if change is None:
        parent = snapshot.parent
        why = "There is no earlier snapshot." if parent is None else f"The parent {_text(parent)} is gone."
        return _section(title, f"<p>{why}</p>")
    counts = {
        "samples added": change.samples_added,
        "samples removed": change.samples_removed,
        "shards unchanged": change.unchanged,
        "shards changed": change.changed,
        "shards added": change.added,
        "shards removed": change.removed,
    }
    counts |= {f"recorded as {name}": count for name, count in change.recorded.items()}
    rows = [
        f'<tr><th scope="row">{_text(name, 60)}</th><td class="number">{_number(count)}</td></tr>'
        for name, count in counts.items()
    ]
    table = _table(f"Against {_text(change.parent)}", ("what", "#count"), rows)
    names = ", ".join(_text(name, 40) for name in change.sidecars_added)
    return _section(title, table + (f"<p>New sidecars: {names}.</p>" if names else ""))


def _hosts_section(report: DatasetReport) -> str:
    hosts = report.statistics.hosts
    if not hosts:
        return ""
    total = sum(host.rows for host in hosts.values())
    ranked = sorted(hosts.items(), key=lambda item: (-item[1].rows, item[0]))
    rows = [
        f'<tr><th scope="row">{_foreign(name or "(no host)", 80)}</th><td class="number">{_number(host.rows)}</td>'
        f'<td class="number">{_share(host.rows, total)}</td><td class="number">{_share(host.successes, host.rows)}</td>'
        f"{_meter(host.rows, ranked[0][1].rows)}</tr>"
        for name, host in ranked[:HOSTS]
    ]
    sampled = "" if report.exact_rows else f", of about {_number(EXACT_ROWS)} rows chosen by their hash"
    title = f"The {len(rows)} hosts with most rows, of {_number(len(hosts))}{sampled}"
    return _section("Hosts", _table(title, ("host", "#rows", "#share", "#became samples", "~"), rows))


def _made_with_section(snapshot: Snapshot) -> str:
    facts = {
        "digest": snapshot.digest,
        "card": snapshot.card or "",
        "fields": ", ".join(snapshot.fields),
        "sidecars": ", ".join(sorted({name for shard in snapshot.shards for name in shard.sidecars})),
        **{name: _option(value) for name, value in snapshot.options.items()},
    }
    rows = [
        f'<tr><th scope="row">{_text(name, 80)}</th><td>{_foreign(masked(value), 300)}</td></tr>'
        for name, value in facts.items()
        if value
    ]
    return _section("Made with", _table("The snapshot's options", ("option", "value"), rows))


def _option(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items() if inner not in (None, "", "[]"))
    return "" if value is None else str(value)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>\n"


def _table(caption: str, columns: Sequence[str], rows: Iterable[str]) -> str:
    """A table; names of number columns begin with ``#``, a column of bars is named ``~``."""
    heads = "".join(
        '<td class="meter"></td>'
        if name == "~"
        else f'<th scope="col"{" class=number" if name.startswith("#") else ""}>{name.removeprefix("#")}</th>'
        for name in columns
    )
    body = "".join(rows)
    return (
        f'<div class="wide"><table><caption>{caption}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _meter(count: int, total: int, kind: str = "") -> str:
    share = 100 * count / total if total else 0.0
    return f'<td class="meter" aria-hidden="true"><div class="{kind}" style="width: {min(share, 100):.2f}%"></div></td>'


def _number(count: int) -> str:
    return f"{count:,}"


def _share(count: int, total: int) -> str:
    if not total:
        return "–"
    share = 100 * count / total
    return "0 %" if not count else "< 0.01 %" if share < 0.01 else f"{share:.2f} %" if share < 10 else f"{share:.1f} %"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _value(value: float, name: str) -> str:
    """A formatted value of a histogram: bytes with unit, ratios with two digits, counts as integers."""
    if name in ("bytes", "sound_bytes", "clip_bytes"):
        return _size(value)
    return f"{value:.2f}" if name in ("aspect", "score", "seconds", "clip_seconds") else f"{value:,.0f}"


def _first_of_each(snapshot: Snapshot, groups: Sequence[Copies], options: ReportLimits) -> dict[str, ShownSample]:
    """The first sample of every group of duplicates, by key; reads only shards that may hold one."""
    keys = [copies.keys[0] for copies in groups]
    if not keys:
        return {}
    likely = [shard for shard in snapshot.shards if any(key.startswith(shard.name) for key in keys)]
    found = representative(Folder(snapshot.folder), likely, keys, options)
    # Keys in shards of other tools need not begin with the shard's name.
    return found if found or likely else representative(Folder(snapshot.folder), snapshot.shards[:1], keys, options)
