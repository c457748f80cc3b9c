"""What is known of a sample, as the JSON of its member ``boxes.json``.

    {"version": 2, "width": 128, "height": 128,          pixels of the image that the boxes and masks are measured in
     "objects": [{"id": 0, "label": "star", "variant": "six-pointed star" or null, "supercategory": "symbol",
                  "colour": "red", "texture": "plain", "size": "large",
                  "bbox": [x, y, width, height],         COCO's convention: pixels, top left, around the visible part
                  "area": 812, "occlusion": 0.12,        visible pixels; hidden fraction of the object's own pixels
                  "depth": 0,                            from the back: 0 is the farthest; equal to id
                  "segmentation": {"size": [height, width], "counts": [...]}}],
     "main": 0,                                          the object that the image is about
     "caption": "...", "caption_true": true,
     "phrases": [{"start": 2, "end": 10, "text": "red star", "kind": "object", "objects": [0]}],
     "more_captions": [{"caption": ..., "caption_true": ..., "phrases": ...}],
     "questions": [{"kind": "colour", "question": "what colour is the star?", "answer": "red"}],
     "scene": {"style": "photo", "ground": "brick", "count": 2, "shapes": [...], "colours": [...]}}

``start`` and ``end`` count Unicode code points, end exclusive, so ``caption[start:end] == text``. ``objects`` of a
phrase are all objects that fit its words (several for "two red stars"); kinds other than ``object`` (``ground``,
``style``) have none. A caption that is wrong on purpose has no phrases.

``counts`` is COCO's uncompressed run-length code: the mask is read column by column (Fortran order), and the counts are
the lengths of runs of 0, 1, 0, 1, ...; the first is the run of zeros and may be 0. It holds the visible pixels.
"""

import json
from typing import Any

from pipeline.shards.segmentation import run_lengths
from pipeline.sources.drawn import world
from pipeline.sources.drawn.scenes import Scene, SceneObject

Record = dict[str, Any]


def object_record(thing: SceneObject, size: int) -> Record:
    """One entry of ``objects``."""
    look = thing.look
    return {
        "id": thing.depth,
        "label": look.shape,
        "variant": look.variant,
        "supercategory": world.noun(look.shape).hypernym,
        "colour": look.colour,
        "texture": look.texture,
        "size": look.size,
        "bbox": list(thing.box),
        "area": thing.area,
        "occlusion": round(thing.occlusion, 4),
        "depth": thing.depth,
        "segmentation": {"size": [size, size], "counts": run_lengths(thing.visible)},
    }


def scene_record(scene: Scene) -> Record:
    """Everything but words: geometry, objects and scene labels."""
    looks = [thing.look for thing in scene.things]
    return {
        "version": world.WORLD_VERSION,
        "width": scene.size,
        "height": scene.size,
        "objects": [object_record(thing, scene.size) for thing in scene.things],
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
    """The record as a detector in training may see it: nothing of the novel shapes, in objects, phrases, questions or
    the scene's labels. Captions stay, since novel shapes are known from them; ids stay too, and may have gaps."""
    kept = [thing for thing in record["objects"] if thing["label"] not in world.NOVEL_SHAPES]
    known = {thing["id"] for thing in kept}
    scene = dict(record["scene"], count=len(kept))
    scene["shapes"] = sorted({thing["label"] for thing in kept})
    scene["colours"] = sorted({thing["colour"] for thing in kept})
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
    """Phrases whose objects are all known; one that also means a novel object would teach a half-truth."""
    return [phrase for phrase in phrases if known.issuperset(phrase["objects"])]
