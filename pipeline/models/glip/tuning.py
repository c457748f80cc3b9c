"""Tuning of a trained GLIP for other data: which weights are trained, and how.

Li, Zhang et al. 2021, arXiv 2112.03857, section 5.3, and the authors' code for it:

    full     all weights, except those of the lowest stages of the backbone
    prompt   a table that is added to BERT's features of the text, one row for each position of a token, zero at first
    linear   the last layers: boxes, centerness, and the product of pixels and tokens

A row of the table belongs to a position, so the prompt has to be the same in training and at test time: all classes,
in the order of training (``fixed_prompts``). Modules without trained weights stay in evaluation mode, without dropout.
In the authors' linear probe the head keeps its dropout.
"""

import logging
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from pipeline.config import require
from pipeline.loaders.grounding_prompts import SpanTokenizer, clean_name, name_chunks
from pipeline.models.glip.config import Config
from pipeline.models.glip.network import GlipNetwork
from pipeline.models.towers.locked import locked_modules

logger = logging.getLogger(__name__)

LINEAR = ("box", "centerness", "project", "token_bias", "prior_bias", "log_scale")
"""Parts of the head that linear tuning trains; the scales of the levels are not among them."""


def freeze(network: GlipNetwork, config: Config) -> list[nn.Module]:
    """Freeze the weights that ``config.tuning`` does not train; returns the modules that stay in evaluation mode."""
    if config.tuning == "full":
        for module in _lowest(network, config.frozen_stages):
            module.requires_grad_(False)
    else:
        network.requires_grad_(False)
    if network.prompt is not None:
        network.prompt.requires_grad_(True)
    if config.tuning == "linear":
        for name, parameter in network.head.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in LINEAR)
    return locked_modules(network)


def _lowest(network: GlipNetwork, count: int) -> list[nn.Module]:
    """The patch embedding and the first ``count - 1`` stages; a stage includes the downsampling after it."""
    body = cast(Any, network.image.body)
    stages = [module for name, module in body.named_children() if name.startswith("layers_")]
    following = [stage.downsample for stage in stages[1:count]]
    return [body.patch_embed, *stages[: count - 1], *following] if count else []


def check_names(config: Config, names: Sequence[str], tokenizer: SpanTokenizer) -> None:
    """Raise ``SettingError`` unless all ``names`` fit into one prompt, in training and detection, and differ in it."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(clean_name(name), name)
        require(other == name, "class_names", name, f"another name, since {other!r} has the same words in a prompt")
    most = min(config.chunk_words, config.grounding.prompt_classes)
    chunks = name_chunks(names, tokenizer, most, config.grounding.text_tokens)
    allowed = f"classes that fit one prompt, at most {most} names and {config.grounding.text_tokens} tokens"
    require(len(chunks) == 1, "class_names", f"{len(names)} names", allowed)


def prompt_order(words: Sequence[str], config: Config) -> list[int]:
    """The numbers of ``words`` in the order in which they are put into prompts.

    A tuned table expects the classes of its training in their order; other words follow. Without a table the order
    stays.
    """
    if config.tuning != "prompt":
        return list(range(len(words)))
    trained = {clean_name(name): place for place, name in enumerate(config.class_names)}
    places = [trained.get(clean_name(word), len(trained)) for word in words]
    if sorted(places) != list(range(len(trained))):
        logger.warning("the table of this model was tuned for other words: %s", ", ".join(config.class_names[:10]))
    return sorted(range(len(words)), key=lambda number: places[number])
