"""CLIP's own claims (Radford et al. 2021): prompts, ensembles of prompts, and pairs that were never seen together."""

from pathlib import Path

from claim import Claim, drawn, named, run

SAMPLES, EPOCHS = 12_000, 7
SETS = ("drawn_shapes", "drawn_unseen_style", "drawn_textures")
PAIRS = "drawn_held_out_pairs"
BARE, SINGLE = "{}", "a photo of a {}."


def measure(seed: int, folder: Path) -> dict[str, float]:
    """Top-1 by kind of prompt: ``ensemble/…``, ``single/…`` (the mean over prompts, one at a time), ``bare/…``."""
    from pipeline.dataset import load_card
    from pipeline.evaluation.models import load_model
    from pipeline.evaluation.suite import Evaluations, evaluate

    output = folder / f"clip-{seed}"
    places = ("--data", drawn(folder / "shards", SAMPLES), "--output-folder", output)
    store = ("--tracking-uri", f"sqlite:///{folder}/mlflow.db")
    run("pretrain_clip", "demo", *places, *store, "--seed", seed, "--epochs", EPOCHS, "--workers", 0)
    model = load_model(str(output), "cpu")
    metrics: dict[str, float] = {}

    def top1(data: str, templates: str) -> float:
        asked = Evaluations(zero_shot=(data,), templates=templates, evaluation_samples=1000)
        return evaluate(model, asked.prepare())[f"zeroshot/{data}/top1"]

    for data in SETS:
        one = folder / "template.txt"
        singles = []
        for template in (template for template in load_card(data).templates if template != BARE):
            one.write_text(template + "\n")
            singles.append(top1(data, str(one)))
        one.write_text(BARE + "\n")
        metrics |= {f"ensemble/{data}": top1(data, "auto"), f"bare/{data}": top1(data, str(one))}
        metrics |= {f"single/{data}": sum(singles) / len(singles), f"best_single/{data}": max(singles)}
    metrics[PAIRS], metrics["chance"] = top1(PAIRS, "auto"), 1 / len(load_card(PAIRS).classes)
    return metrics


CLAIMS = (
    *(
        Claim(f"an ensemble of prompts beats one prompt, {one}", named(f"single/{one}"), named(f"ensemble/{one}"))
        for one in SETS
    ),
    *(Claim(f"sentences beat bare class names, {one}", named(f"bare/{one}"), named(f"single/{one}")) for one in SETS),
    Claim("held-out pairs: more than five times chance", named("chance"), named(PAIRS), lambda low, x: x > 5 * low),
    Claim("held-out pairs: below 90 %", named("chance"), named(PAIRS), lambda low, x: x < 0.9),
)
