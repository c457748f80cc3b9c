"""Our average precision on published annotation files, against pycocotools' or the package lvis'.

    python tests/parity/average_precision.py instances_val2014_100.json \
        --results instances_val2014_fakebbox100_results.json           # COCO's sample results; also its fakesegm100
    pip install --no-deps lvis                                         # lvis would bring a second OpenCV
    python tests/parity/average_precision.py lvis_val_100.json          # LVIS's sample annotations

The annotations take our whole way: the source ``coco``, the member ``boxes.json`` of each sample, ``AveragePrecision``;
the peer reads the file itself. Where no results are given, some are made of the file's objects: moved boxes, cut and
shifted masks, wrong classes, objects that do not exist, with scores that say little. One JSON line for each metric; the
largest difference at the end.
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.evaluation.average_precision import AveragePrecision
from pipeline.evaluation.detection import published_vocabulary
from pipeline.models.detections import Detections
from pipeline.shards.objects import read_objects
from pipeline.shards.sample import Sample
from pipeline.shards.storage import Folder
from pipeline.sources.coco import Coco

Record = dict[str, Any]
KINDS = {"bbox": "", "segm": "mask_"}
SIZES = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "aps": "APs", "apm": "APm", "apl": "APl"}
RARITIES = {"ap_r": "APr", "ap_c": "APc", "ap_f": "APf"}


def made_up(content: Record, kind: str, seed: int = 0) -> list[Record]:
    """Results, some right, some wrong and some far away."""
    random, sizes = np.random.default_rng(seed), {one["id"]: one for one in content["images"]}
    classes, results = [one["id"] for one in content["categories"]], []
    for annotation in content["annotations"]:
        size = sizes[annotation["image_id"]]
        for _ in range(random.integers(0, 4)):
            wrong = random.random() < 0.3
            about: Record = {"image_id": size["id"], "score": float(random.random() * (0.7 if wrong else 1))}
            about["category_id"] = int(random.choice(classes)) if wrong else annotation["category_id"]
            x, y, width, height = annotation["bbox"]
            shift = random.normal(0, 0.1, 2) * [width, height]
            if kind == "bbox":
                grown = np.exp(random.normal(0, 0.15, 2)) * [width, height]
                found = {"bbox": [x + shift[0], y + shift[1], *grown.tolist()]}
            else:
                found = {"segmentation": _moved(annotation["segmentation"], size, shift)}
            results.append(about | found)
    return results


def _moved(segmentation: Any, size: Record, shift: NDArray[np.float64]) -> Record:
    runs = coco_mask.frPyObjects(segmentation, size["height"], size["width"])
    whole = coco_mask.decode(coco_mask.merge(runs) if isinstance(runs, list) else runs)
    moved = np.asfortranarray(np.roll(whole, shift.round().astype(int)[::-1], axis=(0, 1)))
    packed = coco_mask.encode(moved)
    return {"size": packed["size"], "counts": packed["counts"].decode()}


def ours(place: str, content: Record, results: list[Record], kind: str) -> dict[str, float]:
    """Every image through the source, the sample's member and our evaluator."""
    words = published_vocabulary(content, place)
    number = {one["id"]: at for at, one in enumerate(content["categories"])}
    by_image: dict[int, list[Record]] = defaultdict(list)
    for one in results:
        by_image[one["image_id"]].append(one)
    counted = AveragePrecision(words.words, words.groups, with_masks=kind == "segm")
    source = Coco(annotations=place, images="https://localhost/images")
    with tempfile.TemporaryDirectory() as scratch:
        rows = [row for piece in list(source.slices(1000, Folder(scratch))) for row in source.rows(piece)]
    # Among equal scores the first image comes first, and the peers go through images by id.
    for row in sorted(rows, key=lambda row: int(row.columns["image_id"])):
        marked = read_objects(Sample(row.url, dict(row.members)))
        best = sorted(by_image[row.columns["image_id"]], key=lambda one: -one["score"])
        counted.add(marked, _detections(best, number, kind, marked.height, marked.width))
    return counted.metrics()


def _detections(best: list[Record], number: Mapping[int, int], kind: str, height: int, width: int) -> Detections:
    """A mask is given as the grid over a box that is the whole image."""
    corners = [(x, y, x + w, y + h) for x, y, w, h in (one["bbox"] for one in best if kind == "bbox")]
    boxes = torch.tensor(corners if kind == "bbox" else [(0, 0, width, height)] * len(best), dtype=torch.float64)
    masks = None
    if kind == "segm":
        whole = [torch.from_numpy(coco_mask.decode(one["segmentation"])).float() for one in best]
        masks = torch.stack(whole) if whole else torch.zeros(0, height, width)
    scores = torch.tensor([one["score"] for one in best], dtype=torch.float64)
    labels = torch.tensor([number[one["category_id"]] for one in best], dtype=torch.int64)
    return Detections(boxes.view(-1, 4), scores, labels, masks)


def theirs(place: str, content: Record, results: list[Record], kind: str) -> dict[str, float]:
    """The package's own numbers, under our names."""
    with contextlib.redirect_stdout(io.StringIO()):
        if "frequency" not in content["categories"][0]:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval

            truth = COCO(place)
            coco = COCOeval(truth, truth.loadRes(results), kind)
            coco.evaluate()
            coco.accumulate()
            coco.summarize()
            return dict(zip(SIZES, coco.stats.tolist(), strict=False))
        np.float = float  # type: ignore[attr-defined]  # lvis 0.5.3 is from before numpy 1.24
        from lvis import LVIS, LVISEval, LVISResults

        truth = LVIS(place)
        lvis = LVISEval(truth, LVISResults(truth, results), kind)
        lvis.run()
        return {name: lvis.results[theirs] for name, theirs in (SIZES | RARITIES).items()}


def pairs(place: str, given: str) -> Iterator[tuple[str, float, float]]:
    """Each metric, ours and theirs; LVIS's is -1 where there is nothing to count."""
    content = json.loads(Path(place).read_text())
    known = json.loads(Path(given).read_text()) if given else []
    kinds = ["bbox" if "bbox" in known[0] else "segm"] if known else list(KINDS)
    for kind in kinds:
        results = known or made_up(content, kind)
        found, wanted = ours(place, content, results, kind), theirs(place, content, results, kind)
        for name, value in wanted.items():
            yield KINDS[kind] + name, found.get(KINDS[kind] + name, -1.0), value


def main() -> None:
    """A line for each metric."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", help="COCO's or LVIS's instances")
    parser.add_argument("--results", default="", help="in COCO's form; default: made up")
    options = parser.parse_args()
    worst = 0.0
    for name, value, peer in pairs(options.annotations, options.results):
        worst = max(worst, abs(value - peer))
        line = {"name": f"average_precision/{name}", "ours": round(value, 6), "peer": round(peer, 6)}
        print(json.dumps(line | {"conditions": Path(options.annotations).name}))
    print(json.dumps({"name": "average_precision/largest_difference", "ours": worst}))


if __name__ == "__main__":
    main()
