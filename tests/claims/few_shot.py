"""Few-shot adaptation: the claims of CoOp, CoCoOp, MaPLe, CLIP-Adapter and Tip-Adapter, on small CLIPs of drawn data.

They are trained once; a seed draws the shots, and decides starts and order. MaPLe needs a vision transformer, which
learns far less from as many images than the convolutional tower that the others have, so CoCoOp is adapted on both.
What the CLIPs have not seen: sketches (``drawn_unseen_style``), and digits, which no caption of theirs names; the
fine-grained stars and polygons they know from captions alone. Where recipes are not the papers': CoOp has 50 epochs for
every number of shots, for the time it takes; CLIP-Adapter's 1e-5 does next to nothing in so few steps, so it has 1e-3
and a ratio of 0.6, both fixed before anything was measured.
"""

import csv
from pathlib import Path

from claim import Claim, Metrics, drawn, run

SAMPLES, EPOCHS = 30_000, 8
SHOTS = (1, 4, 16)
SKETCH, FINE, DIGITS = "drawn_unseen_style", "drawn_fine_grained", "drawn_digits"
SETS = (SKETCH, FINE, DIGITS)
FEW_SHOT = {
    "zero-shot": "zero_shot",
    "linear probe": "linear_probe",
    "CLIP-Adapter": "clip_adapter:learning_rate=0.001,ratio=0.6",
    "Tip-Adapter": "tip_adapter",
    "Tip-Adapter-F": "tip_adapter_f",
    "CoOp": "coop:epochs=50",
    "CoOp, class-specific": "coop:epochs=50,class_specific=true",
}
BASE_TO_NEW = {
    "zero-shot": "zero_shot",
    "CoOp": "coop:epochs=50",
    "CoCoOp": "cocoop",
}
ON_TRANSFORMER = {"zero-shot, ViT": "zero_shot", "CoCoOp, ViT": "cocoop", "MaPLe": "maple:depth=2"}
COMMON = ("--samples", 1000, "--views", 4, "--processes-count", 0, "--no-track", "--no-keep-adapters")


def measure(seed: int, folder: Path) -> dict[str, float]:
    """Top-1, as ``drawn_digits/CoOp/16`` by shots, and as ``drawn_digits/CoOp/base``, ``new`` and ``harmonic``."""
    small, transformer = (pretrained(folder, name) for name in ("clipmill-small", "clipmill-small-vit"))
    common = ("--data", *SETS, "--seeds", seed + 1, *COMMON)
    few, new, vit = (folder / f"{name}-{seed}" for name in ("few-shot", "base-to-new", "transformer"))
    run(
        "adapt",
        "few-shot",
        "--model",
        small,
        *common,
        "--methods",
        *FEW_SHOT.values(),
        "--shots",
        *SHOTS,
        "--output",
        few,
    )
    run("adapt", "base-to-new", "--model", small, *common, "--methods", *BASE_TO_NEW.values(), "--output", new)
    run("adapt", "base-to-new", "--model", transformer, *common, "--methods", *ON_TRANSFORMER.values(), "--output", vit)
    metrics = _read(few / "table.csv", FEW_SHOT, "shots") | _read(new / "table.csv", BASE_TO_NEW, "measured")
    metrics |= _read(vit / "table.csv", ON_TRANSFORMER, "measured")
    return {name: value for name, value in metrics.items() if not name.startswith("average")}


def pretrained(folder: Path, architecture: str) -> Path:
    """The output folder of a CLIP that was trained on drawn scenes."""
    output = folder / architecture
    places = ("--data", drawn(folder / "shards", SAMPLES), "--output-folder", output)
    how = ("--architecture", architecture, "--epochs", EPOCHS, "--workers", 0, "--loader-workers", 1)
    run("pretrain_clip", "demo", *places, *how, "--tracking-uri", f"sqlite:///{folder}/mlflow.db")
    return output


def _read(file: Path, methods: dict[str, str], column: str) -> dict[str, float]:
    names = {spec: name for name, spec in methods.items()}
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    return {f"{row['data']}/{names[row['method']]}/{row[column]}": float(row["top1_mean"]) for row in rows}


def mean(method: str, *measured: object, sets: tuple[str, ...] = SETS) -> "Metrics":
    """The mean over data sets, and over numbers of shots where several are given."""
    names = [f"{one}/{method}/{what}" for one in sets for what in measured]
    return lambda metrics: sum(metrics[name] for name in names) / len(names)


def few(text: str, lower: str, higher: str, *shots: int, sets: tuple[str, ...] = SETS) -> Claim:
    before = (0,) if lower == "zero-shot" else shots
    return Claim(text, mean(lower, *before, sets=sets), mean(higher, *shots, sets=sets))


CLAIMS = (
    Claim("CoOp beats zero-shot on base classes", mean("zero-shot", "base"), mean("CoOp", "base")),
    few("CoOp beats zero-shot with 16 shots", "zero-shot", "CoOp", 16),
    Claim("CoOp grows from 1 to 4 shots", mean("CoOp", 1), mean("CoOp", 4)),
    Claim("CoOp grows from 4 to 16 shots", mean("CoOp", 4), mean("CoOp", 16)),
    few("a class-specific context loses with 1 shot", "CoOp, class-specific", "CoOp", 1),
    few("a class-specific context wins with 16 shots, fine-grained", "CoOp", "CoOp, class-specific", 16, sets=(FINE,)),
    Claim("CoCoOp beats CoOp on new classes", mean("CoOp", "new"), mean("CoCoOp", "new")),
    Claim(
        "MaPLe's harmonic mean is CoCoOp's or more",
        mean("CoCoOp, ViT", "harmonic"),
        mean("MaPLe", "harmonic"),
        lambda baseline, result: result >= baseline,
    ),  # fmt: skip
    few("CLIP-Adapter beats a linear probe with 1 shot", "linear probe", "CLIP-Adapter", 1),
    few("CLIP-Adapter beats a linear probe with 4 shots", "linear probe", "CLIP-Adapter", 4),
    *(few(f"Tip-Adapter beats zero-shot with {one} shots", "zero-shot", "Tip-Adapter", one) for one in SHOTS),
    *(few(f"Tip-Adapter-F beats Tip-Adapter with {one} shots", "Tip-Adapter", "Tip-Adapter-F", one) for one in SHOTS),
)
