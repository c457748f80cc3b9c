"""What the processes of the parts have imported before they start: their parent imports this module once.

torch, transformers and the methods take ten seconds to import; without this, every part would.
"""

import run  # noqa: F401 - finds this checkout's tests, for the lines below
import torch._dynamo  # noqa: F401

from pipeline.models.method import method_names
from tests.gpu import correctness, device, figures  # noqa: F401

method_names()  # imports every method
