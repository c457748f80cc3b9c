"""The results of few-shot trials as a Markdown table, a csv file and a plot."""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.evaluation.few_shot import harmonic_mean, mean_and_deviation
from pipeline.runs.few_shot import Result
from pipeline.runs.few_shot_ensemble import ENSEMBLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AVERAGE = "average"
HALVES = ("base", "new", "harmonic")
COLUMNS = ("protocol", "data", "method", "shots", "measured", "top1_mean", "top1_deviation", "seeds")
# Eight hues for colour-blind readers (Okabe and Ito 2008); more methods repeat them with other marks.
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B4513", "#444444")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
BAND = 0.15


@dataclass(frozen=True, kw_only=True)
class Score:
    """Top-1 accuracy (0 to 1) over seeds. ``measured`` is a set of images, a half, or ``harmonic``."""

    data: str
    method: str
    shots: int
    measured: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return mean_and_deviation(self.values)[0]

    @property
    def deviation(self) -> float:
        """The sample standard deviation over seeds (n - 1); NaN for one seed."""
        return mean_and_deviation(self.values)[1]


def scores(results: Sequence[Result]) -> list[Score]:
    """Every measurement over its seeds, and the averages over data sets if there are several.

    Averages are computed for each seed and then over seeds. The harmonic mean of an average is that of the averaged
    base and new accuracies, as in the papers, and not an average of harmonic means. With one training data set and
    several test data sets, the average is that of the test data sets.
    """
    found: dict[tuple[str, str, int, str], dict[int, float]] = {}
    for result in results:
        trial = result.trial
        for name, numbers in result.scores.items():
            # An ensemble is a method of its own on the same samples.
            joined = name == ENSEMBLE
            method, measured = (f"{trial.method} + ensemble", trial.data) if joined else (trial.method, name)
            found.setdefault((trial.data, method, trial.shots, measured), {})[trial.seed] = numbers["top1"]
    found |= _averages(found)
    return [
        Score(data=data, method=method, shots=shots, measured=measured, values=tuple(seeds.values()))
        for (data, method, shots, measured), seeds in found.items()
    ]


def table(results: Sequence[Result]) -> str:
    """Markdown: one table per data set, one line per method, with mean and deviation in percent."""
    found = scores(results)
    protocol = results[0].trial.protocol
    few = protocol == "few_shot"
    parts = []
    for data in dict.fromkeys(score.data for score in found):
        own = [score for score in found if score.data == data]
        columns: list[int] | list[str] = (
            sorted({score.shots for score in own}) if few else list(dict.fromkeys(score.measured for score in own))
        )
        lines: dict[str, dict[int | str, Score]] = {}
        for score in own:
            name = score.method if few else _line(score, own)
            lines.setdefault(name, {})[score.shots if few else score.measured] = score
        head = [f"{column} shots" if few else str(column) for column in columns]
        rows = [[name, *(_cell(line.get(column)) for column in columns)] for name, line in lines.items()]
        parts.append(_markdown([data, *head], rows))
    return "\n\n".join(parts) + "\n"


def comma_separated(results: Sequence[Result]) -> str:
    """One line per measurement; values are 0 to 1, not percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in scores(results):
        numbers = (f"{one.mean:.6f}", "" if math.isnan(one.deviation) else f"{one.deviation:.6f}", len(one.values))
        writer.writerow([results[0].trial.protocol, one.data, one.method, one.shots, one.measured, *numbers])
    return text.getvalue()


def figure(results: Sequence[Result], title: str = "") -> "Figure":
    """Accuracy over shots for few-shot runs, else bars for each measurement; one panel per data set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = scores(results)
    few = results[0].trial.protocol == "few_shot"
    data = list(dict.fromkeys(score.data for score in found))
    across = min(3, len(data))
    down = -(-len(data) // across)
    widest = max(len({score.measured for score in found if score.data == one}) for one in data)
    width = 4.6 if few else max(4.6, 1.7 * widest)
    made = Figure(figsize=(width * across + 1.8, 3.6 * down + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(made)
    axes = list(made.subplots(down, across, squeeze=False).flat)
    methods = list(dict.fromkeys(score.method for score in found))
    for axis, name in zip(axes, data, strict=False):
        own = [score for score in found if score.data == name]
        (_lines if few else _bars)(axis, own, methods)
        axis.set_title(name, fontsize=11, parse_math=False)
        axis.set_ylabel("top-1 accuracy (%)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
    for axis in axes[len(data) :]:
        axis.axis("off")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    made.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9)
    if title:
        made.suptitle(title, fontsize=12, parse_math=False)
    return made


def _averages(
    found: Mapping[tuple[str, str, int, str], Mapping[int, float]],
) -> dict[tuple[str, str, int, str], dict[int, float]]:
    data = list(dict.fromkeys(key[0] for key in found))
    measured = list(dict.fromkeys(key[3] for key in found))
    grid = list(dict.fromkeys((method, shots) for _, method, shots, _ in found))
    made: dict[tuple[str, str, int, str], dict[int, float]] = {}
    if len(data) == 1:
        others = [name for name in measured if name not in (*HALVES, data[0])]
        for method, shots in grid if len(others) > 1 else ():
            made[data[0], method, shots, AVERAGE] = _mean_of([found[data[0], method, shots, one] for one in others])
        return made
    for method, shots in grid:
        sets = [one for one in data if any(key[:3] == (one, method, shots) for key in found)]
        if "harmonic" in measured:
            halves = [_mean_of([found[one, method, shots, half] for one in sets]) for half in HALVES[:2]]
            made[AVERAGE, method, shots, "base"], made[AVERAGE, method, shots, "new"] = halves
            made[AVERAGE, method, shots, "harmonic"] = {
                seed: harmonic_mean(halves[0][seed], halves[1][seed]) for seed in halves[0]
            }
        else:
            made[AVERAGE, method, shots, AVERAGE] = _mean_of([found[one, method, shots, one] for one in sets])
    return made


def _mean_of(parts: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean for each seed that all parts have."""
    seeds = [seed for seed in parts[0] if all(seed in part for part in parts)]
    return {seed: sum(part[seed] for part in parts) / len(parts) for seed in seeds}


def _line(score: Score, own: Iterable[Score]) -> str:
    several = len({one.shots for one in own if one.shots}) > 1
    return f"{score.method}, {score.shots} shots" if several and score.shots else score.method


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    spread = "" if math.isnan(score.deviation) else f" ± {100 * score.deviation:.1f}"
    return f"{100 * score.mean:.1f}{spread}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _lines(axis: "Axes", own: Sequence[Score], methods: Sequence[str]) -> None:
    """Accuracy over shots on a log scale; methods without shots are a dashed horizontal line."""
    shots = sorted({score.shots for score in own if score.shots})
    for place, method in enumerate(methods):
        line = sorted((score for score in own if score.method == method), key=lambda score: score.shots)
        hue, mark = HUES[place % len(HUES)], MARKS[place % len(MARKS)]
        if line and line[0].shots == 0:
            axis.axhline(100 * line[0].mean, color=hue, linestyle="--", linewidth=1.5, label=method)
            continue
        at = [shots.index(score.shots) for score in line]
        means = [100 * score.mean for score in line]
        axis.plot(at, means, color=hue, marker=mark, markersize=5, linewidth=1.6, label=method)
        spread = [0.0 if math.isnan(score.deviation) else 100 * score.deviation for score in line]
        low, high = ([mean + sign * one for mean, one in zip(means, spread, strict=True)] for sign in (-1, 1))
        axis.fill_between(at, low, high, color=hue, alpha=BAND, linewidth=0)
    axis.set_xticks(range(len(shots)), [str(one) for one in shots])
    axis.set_xlabel("labelled images of a class")


def _bars(axis: "Axes", own: Sequence[Score], methods: Sequence[str]) -> None:
    """A group of bars for each measurement, a bar for each method; uses the largest number of shots."""
    most = {method: max(score.shots for score in own if score.method == method) for method in _of(own, methods)}
    measured = list(dict.fromkeys(score.measured for score in own))
    width = 0.8 / max(1, len(methods))
    for place, method in enumerate(methods):
        bars = {score.measured: score for score in own if score.method == method and score.shots == most.get(method)}
        at = [number + (place - (len(methods) - 1) / 2) * width for number, one in enumerate(measured) if one in bars]
        chosen = [bars[one] for one in measured if one in bars]
        spread = [0.0 if math.isnan(one.deviation) else 100 * one.deviation for one in chosen]
        hue = HUES[place % len(HUES)]
        axis.bar(at, [100 * one.mean for one in chosen], 0.9 * width, yerr=spread, color=hue, label=method,
                 error_kw={"elinewidth": 1, "ecolor": "#333333"})  # fmt: skip
    tilted = len(measured) > 4
    axis.set_xticks(range(len(measured)), measured, fontsize=9)
    axis.tick_params(axis="x", labelrotation=20 if tilted else 0)


def _of(own: Sequence[Score], methods: Iterable[str]) -> Iterator[str]:
    there = {score.method for score in own}
    return (method for method in methods if method in there)
