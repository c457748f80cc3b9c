"""GLIP; see :mod:`pipeline.models.glip.model`.

config.py      settings and presets
model.py       the method: training step, detection, grounding
network.py     modules from pixels and tokens to logits: pyramid, tower, heads
fusion.py      cross-attention of pixels and tokens; dyhead.py: the dynamic head; text.py: BERT or CLIP
assignment.py  anchors and ATSS; losses.py: alignment, box, centerness
phrases.py     from logits to boxes of phrases
released.py    initial weights from files
tuning.py      what is trained when a trained GLIP is tuned
"""

from pipeline.models.glip.config import Config
from pipeline.models.glip.model import Glip

__all__ = ["Config", "Glip"]
