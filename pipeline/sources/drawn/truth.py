"""The annotations of a sample, as the JSON of its member ``boxes.json``.

    {"version": 2, "width": 128, "height": 128,          size of the image in pixels
     "objects": [{"id": 0, "label": "star", "variant": "six-pointed star" or null, "supercategory": "symbol",
                  "colour": "red", "texture": "plain", "size": "large",
                  "bbox": [x, y, width, height],         as in COCO: pixels, top left, around the visible part
                  "area": 812, "occlusion": 0.12,        visible pixels; hidden fraction of the object's own pixels
                  "depth": 0,                            0 is the farthest; equal to id
                  "segmentation": {"size": [height, width], "counts": [...]}}],
     "main": 0,                                          id of the main object
     "caption": "...", "caption_true": true,
     "phrases": [{"start": 2, "end": 10, "text": "red star", "kind": "object", "objects": [0]}],
     "more_captions": [{"caption": ..., "caption_true": ..., "phrases": ...}],
     "questions": [{"kind": "colour", "question": "what colour is the star?", "answer": "red",
                    "answers": [...]}],                  of the annotators, where there are several
     "scene": {"style": "photo", "ground": "brick", "count": 2, "shapes": [...], "colours": [...]}}

``start`` and ``end`` count Unicode code points, end exclusive, so ``caption[start:end] == text``. ``objects`` of a
phrase are all objects that match it (several for "two red stars"); kinds other than ``object`` (``ground``,
``style``) have none. A caption that is false on purpose has no phrases.

``counts`` is COCO's uncompressed run-length encoding of the visible pixels: the mask is read column by column (Fortran
order), and the counts are the lengths of runs of 0, 1, 0, 1, ...; the first is the run of zeros and may be 0.
"""

import json
from typing import Any

from pipeline.shards.segmentation import run_lengths
from pipeline.sources.drawn import world
from pipeline.sources.drawn.scenes import Scene, SceneObject

Record = dict[str, Any]


def object_record(obj: SceneObject, size: int) -> Record:
    """One entry of ``objects``."""
    look = obj.look
    return {
        "id": obj.depth,
        "label": look.shape,
        "variant": look.variant,
        "supercategory": world.noun(look.shape).hypernym,
        "colour": look.colour,
        "texture": look.texture,
        "size": look.size,
        "bbox": list(obj.box),
        "area": obj.area,
        "occlusion": round(obj.occlusion, 4),
        "depth": obj.depth,
        "segmentation": {"size": [size, size], "counts": run_lengths(obj.visible)},
    }


def scene_record(scene: Scene) -> Record:
    """The part of the record without text: geometry, objects and scene labels."""
    looks = [obj.look for obj in scene.objects]
    return {
        "version": world.WORLD_VERSION,
        "width": scene.size,
        "height": scene.size,
        "objects": [object_record(obj, scene.size) for obj in scene.objects],
        "main": scene.main,
        "scene": {
            "style": scene.style,
            "ground": scene.ground,
            "count": len(looks),
            "shapes": sorted({look.shape for look in looks}),
            "colours": sorted({look.colour for look in looks}),
        },
    }


def only_base(record: Record) -> Record:
    """The record without the novel shapes in objects, phrases, questions and the scene's labels, to train a detector.

    Captions stay, because a method may use novel shapes from captions. Ids stay too, and may have gaps."""
    kept = [obj for obj in record["objects"] if obj["label"] not in world.NOVEL_SHAPES]
    known = {obj["id"] for obj in kept}
    scene = dict(record["scene"], count=len(kept))
    scene["shapes"] = sorted({obj["label"] for obj in kept})
    scene["colours"] = sorted({obj["colour"] for obj in kept})
    more = [dict(entry, phrases=_known(entry["phrases"], known)) for entry in record["more_captions"]]
    return dict(
        record,
        objects=kept,
        main=record["main"] if record["main"] in known else None,
        phrases=_known(record["phrases"], known),
        more_captions=more,
        questions=[],
        scene=scene,
    )


def to_bytes(record: Record) -> bytes:
    """The record as compact JSON, UTF-8."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()


def _known(phrases: list[Record], known: set[int]) -> list[Record]:
    """Phrases whose objects are all known; a phrase that also refers to a novel object would be incomplete."""
    return [phrase for phrase in phrases if known.issuperset(phrase["objects"])]
