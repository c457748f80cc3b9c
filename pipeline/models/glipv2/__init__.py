"""GLIPv2; see :mod:`pipeline.models.glipv2.model`.

config.py    settings and presets, beside those of GLIP
model.py     the method: training step, masks of what is found
reader.py    batches with classes of tokens, masked tokens and masks of objects
contrast.py  the loss between images; segment.py: masks
heads.py     initial weights of these heads
"""

from pipeline.models.glipv2.config import Config
from pipeline.models.glipv2.model import Glipv2

__all__ = ["Config", "Glipv2"]
