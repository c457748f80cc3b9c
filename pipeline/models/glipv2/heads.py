"""Initial weights of the heads beside GLIP's network, from the checkpoint of another run."""

from collections.abc import Mapping

from torch import nn

from pipeline.config import require
from pipeline.loaders.cache import FileCache
from pipeline.models.glip.released import FILES
from pipeline.models.towers.weights import misfit, read_any_weights
from pipeline.shards.storage import Folder

BESIDE = "method.safetensors"
"""File of a checkpoint with the weights beside ``model``."""


def load_heads(heads: Mapping[str, nn.Module], place: str) -> None:
    """Load those of the ``heads``, by their names, that the checkpoint at ``place`` has; GLIP's has none of them.

    Raises:
        SettingError: a head of another shape.
    """
    folder = Folder(place or ".")
    if not place or place.endswith(FILES) or not folder.exists(BESIDE):
        return
    state = read_any_weights(FileCache().fetch(folder, BESIDE), place)
    for name, head in heads.items():
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        if own:
            problem = misfit(head.state_dict(), own)
            require(not problem, "start_from", place, f"weights of the same {name} head; this is {problem}")
            head.load_state_dict(own)
