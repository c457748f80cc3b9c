"""Class vectors from the text tower of a CLIP that teaches another method.

The vector of a class is the mean of the unit features of its name in many prompts, normalised (Radford et al. 2021,
arXiv 2103.00020, section 3.1.4). As in ViLD, names are cleaned, and ``{article}`` in a prompt becomes "a" or "an". The
vector of a class with synonyms, as in LVIS, is the normalised mean of their vectors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.loaders.text import cut_text
from pipeline.models.clip import Clip, Config
from pipeline.models.towers import openclip
from pipeline.models.towers.modes import evaluation_mode
from pipeline.models.towers.prompts import average_prompts, readable_name
from pipeline.models.towers.weights import digest_of
from pipeline.shards.objects import names_of

UNTRAINED = ":untrained"
TEXTS_AT_ONCE = 512


def open_teacher(address: str, field: str = "teacher") -> Clip:
    """The CLIP at ``ARCHITECTURE:WEIGHTS``, in evaluation mode on the CPU.

    WEIGHTS are a tag of open_clip, a file, a checkpoint's folder, or ``untrained`` (random with a fixed seed).

    Raises:
        SettingError: not found, or ``address`` has another form; ``field`` is the name of the option.
    """
    if address.endswith(UNTRAINED):
        return untrained(address.removesuffix(UNTRAINED))
    with torch.random.fork_rng():
        architecture, weights = _parsed(address, field)
        return Clip(Config(architecture=architecture, pretrained=weights)).eval()


def check(address: str, field: str = "teacher") -> None:
    """Raise ``SettingError`` like :func:`open_teacher`; builds and downloads nothing."""
    if address.endswith(UNTRAINED):
        openclip.check_architecture(address.removesuffix(UNTRAINED))
    else:
        openclip.check(*_parsed(address, field))


def untrained(architecture: str) -> Clip:
    """A CLIP with random weights of a fixed seed: the baseline of any training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Clip(Config(architecture=architecture)).eval()


def clip_digest(clip: Clip) -> str:
    """The digest of the teacher that stored region features record."""
    return digest_of(clip, str(clip.transforms(train=False).size[0]))


@torch.no_grad()
def class_vectors(
    clip: Clip, words: Sequence[str], templates: Sequence[str], device: torch.device | None = None
) -> Tensor:
    """Unit vectors float32 [C, D] of the classes ``words`` in all ``templates``, on the device of ``clip``, which
    encodes them in evaluation mode.

    They are computed on ``device``, by default that of ``clip``: 866 names in 80 prompts take minutes on a CPU. A GPU
    computes in full float32, because an error of 1e-3 is a tenth of a logit at ViLD's temperature.
    """
    names = [names_of(word) for word in words]
    prompts = [prompt(template, name) for some in names for name in some for template in templates]
    home, precision = clip.mean.device, torch.get_float32_matmul_precision()
    clip.to(device or home)
    torch.set_float32_matmul_precision("highest")
    try:
        tokens = clip.tokenizer(prompts).split(TEXTS_AT_ONCE)
        with evaluation_mode(clip):
            parts = [clip.encode_text(cut_text(some, clip.end_of_text).to(clip.mean.device)) for some in tokens]
    finally:
        torch.set_float32_matmul_precision(precision)
        clip.to(home)
    vectors = average_prompts(torch.cat(parts).float(), len(templates)).split([len(some) for some in names])
    return functional.normalize(torch.stack([some.mean(dim=0) for some in vectors]), dim=-1).to(home)


def fastest_device() -> torch.device:
    """A GPU if this process sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prompt(template: str, word: str) -> str:
    """The prompt for a class name, such as ``This is a photo of an airplane.``

    ViLD's rules: underscores become spaces, a slash becomes "or", names are in lower case without a full stop. If a
    template has ``{article}`` and the sentence would begin with "a" or "the", it begins with "This is".
    """
    name = readable_name(word.replace("/", " or ")).lower().rstrip(".")
    article = "an" if name[:1] in tuple("aeiou") else "a"
    written = template.replace("{article}", article).replace("{}", name)
    begins = written.startswith(("a ", "an ", "the "))
    return f"This is {written}" if "{article}" in template and begins else written


def _parsed(address: str, field: str) -> tuple[str, str | None]:
    found = openclip.parse_address(address)
    if found is None:
        allowed = (
            "a CLIP's run or checkpoint, or ARCHITECTURE:WEIGHTS, such as ViT-B/32:openai; WEIGHTS may be a folder"
        )
        raise SettingError(field, address, allowed)
    return found
