"""The table as text, the JSON as it is read back."""

import json
from pathlib import Path

from pipeline.evaluation.report import table, write_result

METRICS = {
    "zeroshot/shapes/top1": 0.5,
    "zeroshot/shapes/top5": 0.75,
    "zeroshot/shapes/mean_per_class": 0.4567,
    "zeroshot/shapes/chance": 1 / 24,
    "zeroshot/shapes/samples": 2000.0,
}


def test_the_table_has_a_line_for_each_set() -> None:
    assert table(METRICS).splitlines() == [
        "zero-shot    top-1    top-5  per class  chance  samples",
        "shapes     50.00 %  75.00 %    45.67 %  4.17 %    2,000",
    ]


def test_retrieval_has_a_table_of_its_own() -> None:
    names = [f"{way}_{what}" for way in ("i2t", "t2i") for what in ("r1", "r5", "r10", "median_rank")]
    metrics = {f"retrieval/drawn/{name}": 1.0 for name in [*names, "chance", "samples"]}
    head, line = table({**METRICS, **metrics}).split("\n\n")[1].splitlines()
    assert head.split("  ")[0] == "retrieval" and "i2t R@1" in head and "t2i median" in head
    assert line.split()[0] == "drawn" and len(head) == len(line)


def test_the_file_says_what_was_evaluated(tmp_path: Path) -> None:
    write_result(str(tmp_path / "new" / "r.json"), METRICS, {"checkpoint": "x", "step": None})
    read = json.loads((tmp_path / "new" / "r.json").read_text())
    assert read == {"checkpoint": "x", "step": None, "metrics": METRICS}
