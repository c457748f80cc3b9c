"""DepthCLIP's claims (Zhang et al. 2022, section 4), and those of trained bins: CLIP's words order distances.

The CLIP is trained on captions of drawn rooms, which say how far objects and walls are: a CLIP that never read such
words has nothing to say about distances. Its image tower is a transformer, whose patches have a map. A seed decides the
CLIP and the training of the bins. Claims are about the mean difference of logarithms (``log10``, smaller is better),
which the median minimises among constants; the part of the pixels within a ratio of 1.25 (``delta1``) is kept, too.

``constant``: the best single distance for all pixels, the median of the training images. ``released`` and
``projected``: the paper's words and bins with both maps. ``trained``: bins and temperature of the projected map;
``scenes``: with bins for each class of places; ``vectors``: with the words' vectors trained, too.
"""

from pathlib import Path

from claim import Claim, named, run

IMAGES, VALIDATED, EPOCHS, BIN_EPOCHS = 6000, 300, 12, 3
ONE_THREAD = ("--workers", 0, "--loader-workers", 0)
PLACES = ("shelf", "room", "hall")


def measure(seed: int, folder: Path) -> dict[str, float]:
    """``log10/constant``, ``log10/released``, ``delta1/constant`` and so on, of the validation images."""
    from pipeline.evaluation.models import load_any

    rooms, val = folder / "rooms", folder / "val"
    draw = ("refresh_dataset", "drawn", "--depth", "--size", 64, "--processes-count", 0)
    run(*draw, "--samples", IMAGES, "--number-sample-per-shard", 500, "--output-folder", rooms)
    run(*draw, "--samples", VALIDATED, "--split", "val", "--output-folder", val)
    store = ("--tracking-uri", f"sqlite:///{folder}/mlflow.db", "--seed", seed)
    clip = folder / f"clip-{seed}"
    what = ("--architecture", "clipmill-small-vit", "--epochs", EPOCHS, "--batch-size", 64)
    run("pretrain_clip", "demo", "--data", rooms, "--output-folder", clip, *what, *ONE_THREAD, *store)
    plain = load_any(str(clip), "cpu")
    found = {"constant": errors(Constant(median(rooms)), val, "projected")}
    found |= {mode: errors(plain, val, mode) for mode in ("released", "projected")}
    bins = ("train_depthclip", "drawn", "--data", rooms, "--pretrained", clip, "--epochs", BIN_EPOCHS, *store)
    vectors = ("--trained", "bins", "temperature", "words")
    for name, more in (("trained", ()), ("scenes", ("--scenes", *PLACES)), ("vectors", vectors)):
        output = folder / f"{name}-{seed}"
        run(*bins, *more, "--output-folder", output)
        found[name] = errors(load_any(str(output), "cpu"), val, "projected")
    return {f"{metric}/{name}": one[metric] for name, one in found.items() for metric in ("log10", "delta1")}


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


def errors(model: object, val: Path, mode: str) -> dict[str, float]:
    """The metrics of a model on the validation images, by name."""
    from pipeline.evaluation.suite import Evaluations, evaluate

    asked = Evaluations(depth=(f"val={val},mode={mode},pixels=model",))
    return {name.rpartition("/")[2]: value for name, value in evaluate(model, asked.prepare()).items()}


def less(text: str, before: str, after: str, factor: float = 1.0) -> Claim:
    return Claim(text, named(f"log10/{before}"), named(f"log10/{after}"), lambda old, new: new < factor * old)


CLAIMS = (
    less("given words and bins, projected: better than the best constant", "constant", "projected"),
    less("given words and bins: projected beats released", "released", "projected"),
    less("trained bins beat the given ones", "projected", "trained"),
    less("trained bins: four fifths of the best constant's error", "constant", "trained", 0.8),
    less("bins for each class of places beat one set of bins", "trained", "scenes"),
    less("trained vectors of words beat trained bins alone", "trained", "vectors"),
)
