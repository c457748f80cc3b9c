"""The results of optimised images: a table, a parquet file, and a gallery as one HTML page."""

import hashlib
import html
import io
from collections.abc import Mapping, Sequence
from statistics import mean
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.runs.drawings import IMAGES, DrawingResult
from pipeline.shards.privacy import masked
from pipeline.stages.report.dataset_report import plain

SCORES = "scores.parquet"
LONGEST_METRIC = 200
TYPES: dict[str, pa.DataType] = {
    **dict.fromkeys(("name", "method", "subject"), pa.string()),
    "seed": pa.int64(),
    "best": pa.bool_(),
    **dict.fromkeys(("loss", "judge"), pa.float64()),
    **dict.fromkeys(("steps", "retries"), pa.int64()),
    "seconds": pa.float64(),
    "status": pa.string(),
    "guides": pa.list_(pa.string()),
    **dict.fromkeys(("png", "svg", "film"), pa.string()),
}
FILMS = (".gif", ".mp4")
POLICY = (
    "default-src 'none'; img-src 'self' file: data:; media-src 'self' file:; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --raised: #f4f6f8; --ink: #1c2430; --faint: #56616f;
  --best: #2563a8; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161c; --raised: #1b2129; --ink: #e6eaf0; --faint: #9aa6b4;
  --best: #6aa9e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1440px; margin: 0 auto; padding: 1rem clamp(0.8rem, 3vw, 2.5rem) 3rem; }
h1 { font-size: 1.5rem; margin: 0.6rem 0; }
h2 { font-size: 1.1rem; margin: 1.8rem 0 0.4rem; overflow-wrap: anywhere; }
.row { display: grid; gap: 0.9rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); }
figure { background: var(--raised); border: 2px solid transparent; border-radius: 8px; margin: 0; padding: 0.6rem; }
figure.best { border-color: var(--best); }
img, video { width: 100%; border-radius: 4px; display: block; background: #ffffff; }
.steps { display: flex; gap: 0.3rem; margin-top: 0.4rem; }
.steps img { width: 3.2rem; }
figcaption { font-size: 0.85rem; color: var(--faint); overflow-wrap: anywhere; }
a { color: inherit; }
"""


def best_names(results: Sequence[DrawingResult]) -> set[str]:
    """For each method and subject the image with the lowest loss without augmentation, as CLIPasso chooses it; never a
    failed one."""
    groups: dict[tuple[str, str], list[DrawingResult]] = {}
    for result in finished(results):
        groups.setdefault((result.unit.method, result.unit.subject), []).append(result)
    return {min(some, key=lambda one: (one.loss != one.loss, one.loss)).unit.name for some in groups.values()}


def finished(results: Sequence[DrawingResult]) -> list[DrawingResult]:
    """Those that have not failed."""
    return [one for one in results if one.status == "finished"]


def scores_parquet(results: Sequence[DrawingResult]) -> bytes:
    """One row for each image."""
    best, rows = best_names(results), []
    for one in results:
        unit = one.unit
        row = {"name": unit.name, "method": unit.method, "subject": unit.subject, "seed": unit.seed}
        row |= {"best": unit.name in best, "loss": one.loss, "judge": one.judge, "steps": one.steps}
        row |= {"retries": one.retries, "seconds": one.seconds, "status": one.status}
        row |= {"guides": sorted(set(one.guides.values())), **_files(one)}
        rows.append(row)
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(TYPES)), content)
    return content.getvalue()


def _files(result: DrawingResult) -> dict[str, str | None]:
    """The paths of an image's PNG, SVG and film below the output folder."""
    name = result.unit.name
    wanted = {"png": (f"{name}.png",), "svg": (f"{name}.svg",), "film": tuple(f"{name}{end}" for end in FILMS)}
    return {
        kind: next((f"{IMAGES}/{file}" for file in result.files if file in some), None) for kind, some in wanted.items()
    }


def metric_name(method: str) -> str:
    """A method with its options, secrets masked, as a part of a metric's name, of which MLflow takes 250 characters."""
    name = "".join(letter if letter.isalnum() or letter in "_-." else "_" for letter in masked(method))
    digest = hashlib.sha256(method.encode()).hexdigest()[:10]
    return name if len(name) <= LONGEST_METRIC else f"{name[: LONGEST_METRIC - 11]}-{digest}"


def drawings_table(results: Sequence[DrawingResult]) -> str:
    """Markdown: the judge's mean over subjects and seeds of each method, and of the best seeds, without failed images;
    and their number."""
    best = best_names(results)
    names = ("method", "images", "judge, mean", "judge, best seeds", "seconds each", "failed")
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for method in dict.fromkeys(one.unit.method for one in results):
        every = [one for one in results if one.unit.method == method]
        some = finished(every)
        scores = [one.judge for one in some], [one.judge for one in some if one.unit.name in best]
        means = " | ".join(f"{mean(one):.3f}" if one else "-" for one in scores)
        seconds = mean(one.seconds for one in every)
        lines.append(f"| {masked(method)} | {len(every)} | {means} | {seconds:.1f} | {len(every) - len(some)} |")
    return "\n".join(lines)


def gallery(results: Sequence[DrawingResult], facts: Mapping[str, str]) -> str:
    """All images by subject and method, with their numbers, films and SVG; files are beside the page."""
    best = best_names(results)
    parts = []
    for subject in dict.fromkeys(one.unit.subject for one in results):
        parts.append(f"<h2><bdi>{_text(subject, 300)}</bdi></h2><div class='row'>")
        parts += [_figure(one, one.unit.name in best) for one in results if one.unit.subject == subject]
        parts.append("</div>")
    about = " · ".join(f"{_text(name)}: {_text(value, 300)}" for name, value in facts.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Optimised images</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{len(results)} images</h1><p>{about}</p>\n{''.join(parts)}</main></body></html>\n"
    )


def _figure(result: DrawingResult, is_best: bool) -> str:
    unit, files = result.unit, _files(result)
    title = _text(f"{unit.subject}, {unit.method}, seed {unit.seed}", 200)
    film = files["film"] or ""
    if film.endswith(".mp4"):
        poster = quote(files["png"] or "")
        shown = f'<video controls loop muted preload="none" poster="{poster}" src="{quote(film)}"></video>'
    else:
        shown = f'<img loading="lazy" alt="{title}" src="{quote(files["png"] or "")}">'
    steps = "".join(
        f'<img loading="lazy" alt="step {_step(file)}" src="{quote(f"{IMAGES}/{file}")}">'
        for file in result.files
        if "-step-" in file
    )
    links = [f'<a href="{quote(path)}">{kind}</a>' for kind, path in files.items() if path]
    words = f"{_text(unit.method)}, seed {unit.seed}{' (best)' if is_best else ''}<br>"
    if result.status == "failed":
        words += f"failed: not finite after {result.steps} steps<br>{' · '.join(links)}"
    else:
        words += f"judge {result.judge:.3f}, loss {result.loss:.4g}, {result.steps} steps<br>{' · '.join(links)}"
    return (
        f'<figure{" class=best" if is_best else ""}>{shown}<div class="steps">{steps}</div>'
        f"<figcaption>{words}</figcaption></figure>\n"
    )


def _step(file: str) -> int:
    return int(file.rpartition("-step-")[2].partition(".")[0])


def _text(text: str, longest: int = 120) -> str:
    """For HTML, with secrets masked."""
    return html.escape(plain(masked(text), longest), quote=True)
