"""DepthCLIP's claims (Zhang et al. 2022, section 4), and those of trained bins: CLIP's words order distances.

The CLIP is trained on captions of drawn rooms, which say how far objects and walls are: a CLIP that never read such
words has nothing to say about distances. Its image tower is a transformer, whose patches have a map. A seed decides the
CLIP and the training of the bins. All numbers are the part of the pixels whose ratio to the truth is below 1.25.

``constant``: the best single distance for all pixels, the median of the training images. ``released`` and
``projected``: the paper's words and bins with both maps. ``trained``: bins and temperature of the projected map;
``scenes``: with bins for each class of places.
"""

from pathlib import Path

from claim import Claim, named, run

IMAGES, VALIDATED, EPOCHS, BIN_EPOCHS = 6000, 300, 10, 3
ONE_THREAD = ("--workers", 0, "--loader-workers", 0)
PLACES = ("shelf", "room", "hall")


def measure(seed: int, folder: Path) -> dict[str, float]:
    """``constant``, ``released``, ``projected``, ``trained`` and ``scenes``: delta 1.25 of the validation images."""
    from pipeline.evaluation.models import load_any

    rooms, val = folder / "rooms", folder / "val"
    draw = ("refresh_dataset", "drawn", "--depth", "--size", 64, "--processes-count", 0)
    run(*draw, "--samples", IMAGES, "--number-sample-per-shard", 500, "--output-folder", rooms)
    run(*draw, "--samples", VALIDATED, "--split", "val", "--output-folder", val)
    store = ("--tracking-uri", f"sqlite:///{folder}/mlflow.db", "--seed", seed)
    clip = folder / f"clip-{seed}"
    what = ("--architecture", "clipmill-small-vit", "--epochs", EPOCHS)
    run("pretrain_clip", "demo", "--data", rooms, "--output-folder", clip, *what, *ONE_THREAD, *store)
    plain = load_any(str(clip), "cpu")
    metrics = {"constant": delta1(Constant(median(rooms)), val, "projected")}
    metrics |= {mode: delta1(plain, val, mode) for mode in ("released", "projected")}
    bins = ("train_depthclip", "drawn", "--data", rooms, "--pretrained", clip, "--epochs", BIN_EPOCHS, *store)
    for name, more in (("trained", ()), ("scenes", ("--scenes", *PLACES))):
        output = folder / f"{name}-{seed}"
        run(*bins, *more, "--output-folder", output)
        metrics[name] = delta1(load_any(str(output), "cpu"), val, "projected")
    return metrics


class Constant:
    """One distance for all pixels."""

    scenes = ()

    def __init__(self, metres: float) -> None:
        self.metres = metres

    def estimate_depth(self, images, scenes=None, flip=True):
        """As every estimator."""
        import torch

        return [torch.full(image.shape[1:], self.metres) for image in images]


def median(rooms: Path) -> float:
    """The median distance of the pixels of 200 images."""
    import torch

    from pipeline.evaluation.data import open_data
    from pipeline.loaders.depth import DepthReader

    reader = DepthReader(size=None)
    return float(torch.stack([reader.read(one)["depth"] for one in open_data(str(rooms)).samples(200)]).median())


def delta1(model: object, val: Path, mode: str) -> float:
    from pipeline.evaluation.suite import Evaluations, evaluate

    asked = Evaluations(depth=(f"val={val},mode={mode},pixels=model",))
    return evaluate(model, asked.prepare())["depth/val/delta1"]


CLAIMS = (
    Claim("given words and bins, projected: better than the best constant", named("constant"), named("projected")),
    Claim("given words and bins: projected beats released", named("released"), named("projected")),
    Claim("trained bins beat the given ones", named("projected"), named("trained")),
    Claim(
        "trained bins: 1.25 times the best constant", named("constant"), named("trained"), lambda low, x: x > 1.25 * low
    ),
    Claim("bins for each class of places beat one set of bins", named("trained"), named("scenes")),
)
