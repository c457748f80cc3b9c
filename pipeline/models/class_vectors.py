"""Vectors of class names from the text tower of a CLIP that teaches another method, and that method's words for it.

A class is the mean of the unit features of its name in many prompts, made unit length again (Radford et al. 2021, arXiv
2103.00020, section 3.1.4), as ViLD has it: names are cleaned, ``{article}`` in a prompt becomes "a" or "an". A class
with several names, as LVIS's are, is the mean of their vectors, made unit length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.loaders.text import cut_text
from pipeline.models.clip import Clip, Config
from pipeline.models.towers import openclip
from pipeline.models.towers.prompts import average_prompts
from pipeline.models.towers.weights import digest_of
from pipeline.shards.objects import names_of

UNTRAINED = ":untrained"
TEXTS_AT_ONCE = 512


def open_teacher(address: str) -> Clip:
    """The CLIP at ``ARCHITECTURE:WEIGHTS``, in evaluation mode on the CPU.

    WEIGHTS are a tag of open_clip, a file, a checkpoint's folder, or ``untrained``: random, always the same ones.

    Raises:
        SettingError: there is none, or ``address`` has another form.
    """
    if address.endswith(UNTRAINED):
        return untrained(address.removesuffix(UNTRAINED))
    with torch.random.fork_rng():
        return Clip(Config(architecture=_parsed(address)[0], pretrained=_parsed(address)[1])).eval()


def check(address: str) -> None:
    """Raise ``SettingError`` as :func:`open_teacher` does; nothing is built or fetched."""
    if address.endswith(UNTRAINED):
        openclip.check_architecture(address.removesuffix(UNTRAINED))
    else:
        openclip.check(*_parsed(address))


def untrained(architecture: str) -> Clip:
    """A CLIP with random weights that do not change: what any training has to beat."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Clip(Config(architecture=architecture)).eval()


def clip_digest(clip: Clip) -> str:
    """The digest under which stored features of regions name their teacher."""
    return digest_of(clip, str(clip.transforms(train=False).size[0]))


@torch.no_grad()
def class_vectors(
    clip: Clip, words: Sequence[str], templates: Sequence[str], device: torch.device | None = None
) -> Tensor:
    """Unit vectors float32 [C, D] of the classes ``words`` in all ``templates``, on the device where ``clip`` is.

    They are computed on ``device``, by default there too: 866 names in 80 prompts take minutes on a CPU. On a GPU in
    full float32, since an error of 1e-3 would be a tenth of a logit at ViLD's temperature.
    """
    names = [names_of(word) for word in words]
    prompts = [prompt(template, name) for some in names for name in some for template in templates]
    home, precision = clip.mean.device, torch.get_float32_matmul_precision()
    clip.to(device or home)
    torch.set_float32_matmul_precision("highest")
    try:
        tokens = clip.tokenizer(prompts).split(TEXTS_AT_ONCE)
        parts = [clip.encode_text(cut_text(some, clip.end_of_text).to(clip.mean.device)) for some in tokens]
    finally:
        torch.set_float32_matmul_precision(precision)
        clip.to(home)
    vectors = average_prompts(torch.cat(parts).float(), len(templates)).split([len(some) for some in names])
    return functional.normalize(torch.stack([some.mean(dim=0) for some in vectors]), dim=-1).to(home)


def fastest_device() -> torch.device:
    """A GPU where this process sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prompt(template: str, word: str) -> str:
    """``This is a photo of an airplane.`` of ``{article} {}``-like templates and ``Airplane_``-like names.

    ViLD's rules: underscores are spaces, a slash is "or", names are in lower case without a full stop; where a template
    asks for the article, a sentence that would begin with "a" or "the" begins with "This is".
    """
    name = word.replace("_", " ").replace("/", " or ").lower().strip().rstrip(".")
    article = "an" if name[:1] in tuple("aeiou") else "a"
    written = template.replace("{article}", article).replace("{}", name)
    begins = written.startswith(("a ", "an ", "the "))
    return f"This is {written}" if "{article}" in template and begins else written


def _parsed(address: str) -> tuple[str, str | None]:
    found = openclip.parse_address(address)
    if found is None:
        raise SettingError("teacher", address, "ARCHITECTURE:WEIGHTS, such as ViT-B-32:openai; WEIGHTS may be a folder")
    return found
