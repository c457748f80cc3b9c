"""The result of a search as one HTML page that shows images and plays sounds and videos.

The page is self-contained: images are inline JPEG, spectrograms inline PNG, sounds inline FLAC, videos inline MP4,
without scripts and links, and its content security policy forbids all other requests. Captions are untrusted: one line
each, escaped. A video that was found by its frames begins at the best moment; a curve below it shows the cosines.
"""

import base64
import html
from collections.abc import Callable
from io import BytesIO
from typing import Any

from PIL import Image
from torch import Tensor

from pipeline.evaluation.media import TEXT
from pipeline.evaluation.moments import MOMENTS, Moment
from pipeline.evaluation.search import Match, Query, SearchResult
from pipeline.evaluation.shown_clips import frame_at, playable_clip
from pipeline.evaluation.shown_media import picture, sound_of, spectrogram
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.media import MEDIA, VIDEO
from pipeline.shards.privacy import masked
from pipeline.shards.waveforms import encode_flac
from pipeline.stages.annotate.embeddings import caption_of
from pipeline.stages.report.dataset_report import plain

SIDE = 420
"""Longer side of a shown image in pixels; larger ones are reduced."""
POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --raised: #f4f6f8; --ink: #1c2430; --faint: #56616f;
  --line: #d5dbe2; --bar: #2563a8; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161c; --raised: #1b2129; --ink: #e6eaf0; --faint: #9aa6b4;
  --line: #333c48; --bar: #6aa9e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1440px; margin: 0 auto; padding: 1rem clamp(0.8rem, 3vw, 2.5rem) 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.6rem 0; overflow-wrap: anywhere; }
p { max-width: 75ch; margin: 0.4rem 0; }
.faint { color: var(--faint); }
.query { max-width: 26rem; }
ol { list-style: none; margin: 1rem 0; padding: 0; display: grid; gap: 0.9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
li, .query { background: var(--raised); border-radius: 8px; padding: 0.7rem; display: flex; flex-direction: column;
  gap: 0.5rem; }
.score { display: flex; gap: 0.6rem; align-items: center; font-variant-numeric: tabular-nums; }
.score b { font-size: 1.1rem; }
meter { flex: 1; height: 0.7rem; accent-color: var(--bar); }
img { max-width: 100%; border-radius: 4px; display: block; }
img.image { max-height: 16rem; object-fit: contain; background: #808080; }
img.spectrogram { width: 100%; height: 5.5rem; }
audio { width: 100%; height: 2.4rem; }
video { width: 100%; max-height: 16rem; background: #000000; border-radius: 4px; display: block; }
svg.moments { width: 100%; height: 2.2rem; display: block; }
.moments polyline { fill: none; stroke: var(--bar); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.moments line { stroke: #d6422b; stroke-width: 2; vector-effect: non-scaling-stroke; }
.words { margin: 0; overflow-wrap: anywhere; }
small { color: var(--faint); overflow-wrap: anywhere; }
"""


def search_page(query: Query, result: SearchResult, about: dict[str, str], seconds: float) -> str:
    """The whole page as HTML text; ``about`` is a list of facts, ``seconds`` of each sound are played."""
    name = f"“{plain(query.text, 200)}”" if query.medium == TEXT else f"{MEDIA[query.medium].noun} as the query"
    shown = (
        ""
        if query.medium == TEXT
        else f'<div class="query">{_media(Match(1.0, query.sample), "the query", seconds)}</div>'
    )
    facts = " · ".join(f"{_text(title)}: {_text(value, 300)}" for title, value in about.items())
    items = "".join(_item(rank, match, seconds) for rank, match in enumerate(result.matches, 1))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Search: {_text(name, 100)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>Search: <bdi>{_text(name, 300)}</bdi></h1>{shown}"
        f'<p>{_counts(result)}</p><p class="faint">{facts}</p>\n<ol>{items}</ol></main></body></html>\n'
    )


def facts_of(data: str, checkpoint: str, cut: int | None) -> dict[str, str]:
    """What the page says about the search; secrets in addresses are masked."""
    words = {} if cut is None else {"the model reads": f"the first {cut} words of the query"}
    return {"data": masked(data), "model": masked(checkpoint), **words}


def _counts(result: SearchResult) -> str:
    medium, by = (VIDEO.name, "best frame") if result.medium == MOMENTS else (result.medium, result.medium)
    without = f"; {result.without:,} have no readable {medium}" if result.without else ""
    return f"The best {len(result.matches):,} of {result.compared:,} samples by their {by}{without}."


def _item(rank: int, match: Match, seconds: float) -> str:
    caption = plain(caption_of(match.sample) or "", 400)
    words = f"<bdi>{html.escape(caption)}</bdi>" if caption else "<em>no caption</em>"
    return (
        f'<li><div class="score"><b>{rank}</b><meter min="-1" max="1" value="{match.score:.4f}" '
        f'aria-label="cosine similarity"></meter><span>{match.score:.3f}</span></div>'
        f'{_media(match, caption or match.sample.key, seconds)}<p class="words">{words}</p>'
        f"<small>{_text(match.sample.key)}</small></li>\n"
    )


def _media(match: Match, title: str, seconds: float) -> str:
    """Every part of a sample that can be shown; a note for one that cannot be read."""
    parts = []
    for medium, show in PLAYERS.items():
        if match.sample.body(MEDIA[medium]) is not None:
            try:
                parts.append(show(match, title, seconds))
            except UnreadableSample:
                parts.append(f'<small class="broken">{medium}: not readable</small>')
    return "".join(parts)


def _image(match: Match, title: str, seconds: float) -> str:
    pixels = Image.fromarray(picture(match.sample, "image").numpy().transpose(1, 2, 0))
    pixels.thumbnail((SIDE, SIDE))
    return f'<img class="image" alt="{_text(title, 150)}" src="{_data("image/jpeg", _encoded(pixels, "JPEG"))}">'


def _sound(match: Match, title: str, seconds: float) -> str:
    sound = sound_of(match.sample, seconds)
    drawn: Tensor = spectrogram(sound)
    png = _encoded(Image.fromarray(drawn.numpy().transpose(1, 2, 0)), "PNG")
    played = _data("audio/flac", encode_flac(sound.samples, sound.sample_rate))
    return (
        f'<img class="spectrogram" alt="Spectrogram of {sound.seconds:.3g} seconds" src="{_data("image/png", png)}">'
        f'<audio controls preload="metadata" aria-label="{_text(title, 150)}" src="{played}"></audio>'
    )


def _video(match: Match, title: str, seconds: float) -> str:
    """The clip, from the best moment on; the frame of this moment until it plays."""
    moment = match.moment
    at = moment.seconds if moment else 0.0
    clip = _data("video/mp4", playable_clip(match.sample, seconds, at))
    start = at - max(0.0, at - seconds / 2)  # in the clip, which is a part of a long video
    poster = Image.fromarray(frame_at(match.sample, at).numpy().transpose(1, 2, 0))
    shown = _data("image/jpeg", _encoded(poster, "JPEG"))
    return (
        f'<video controls muted playsinline preload="metadata" aria-label="{_text(title, 150)}" poster="{shown}" '
        f'src="{clip}#t={start:.3f}"></video>{_curve(moment) if moment else ""}'
    )


def _curve(moment: Moment) -> str:
    """The cosines of a video's frames over time as a line, with a mark at the best moment."""
    low, high = float(moment.scores.min()), float(moment.scores.max())
    length, span = max(moment.length, 1e-6), max(high - low, 1e-6)
    points = " ".join(
        f"{100 * time / length:.2f},{19 - 18 * (score - low) / span:.2f}"
        for time, score in zip(moment.times.tolist(), moment.scores.tolist(), strict=True)
    )
    place = 100 * moment.seconds / length
    words = f"best moment at {moment.seconds:.2f} of {moment.length:.2f} seconds"
    return (
        f'<svg class="moments" viewBox="0 0 100 20" preserveAspectRatio="none" role="img" aria-label="{words}">'
        f'<polyline points="{points}"></polyline><line x1="{place:.2f}" y1="0" x2="{place:.2f}" y2="20"></line></svg>'
        f"<small>{words}; cosines of frames {low:.3f} to {high:.3f}</small>"
    )


PLAYERS: dict[str, Callable[[Match, str, float], str]] = {"image": _image, "audio": _sound, "video": _video}
"""How a part of each medium is shown."""


def _encoded(image: Image.Image, kind: str) -> bytes:
    content = BytesIO()
    settings: dict[str, Any] = {"quality": 85} if kind == "JPEG" else {}
    image.save(content, kind, **settings)
    return content.getvalue()


def _data(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def _text(text: str, longest: int = 400) -> str:
    return html.escape(plain(text, longest), quote=True)
