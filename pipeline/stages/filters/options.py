"""The filters of a job: which, in which order, and the options of each."""

from dataclasses import dataclass, field

from pipeline.config import require
from pipeline.stages.filters.classifier import ClassifierFilter
from pipeline.stages.filters.clip_score import ClipScore
from pipeline.stages.filters.datacomp import UidList
from pipeline.stages.filters.duplicates import ExactDuplicates
from pipeline.stages.filters.filter import Filter
from pipeline.stages.filters.language import Language
from pipeline.stages.filters.length import Length
from pipeline.stages.filters.metaclip import MetaClip
from pipeline.stages.filters.perceptual import PerceptualDuplicates
from pipeline.stages.filters.repetition import Repetition
from pipeline.stages.filters.semantic import SemanticDuplicates
from pipeline.stages.filters.size import Size
from pipeline.stages.filters.text import Text


@dataclass(frozen=True, kw_only=True)
class Filters:
    """All filters with their options; only those in ``steps`` run, in that order."""

    steps: tuple[str, ...]
    """Of text, length, language, repetition, size, exact_duplicates, near_duplicates, semantic_duplicates, clip_score,
    metaclip, uids, classifier."""
    text: Text = field(default_factory=Text)
    length: Length = field(default_factory=Length)
    language: Language = field(default_factory=Language)
    repetition: Repetition = field(default_factory=Repetition)
    size: Size = field(default_factory=Size)
    exact_duplicates: ExactDuplicates = field(default_factory=ExactDuplicates)
    near_duplicates: PerceptualDuplicates = field(default_factory=PerceptualDuplicates)
    semantic_duplicates: SemanticDuplicates = field(default_factory=SemanticDuplicates)
    clip_score: ClipScore = field(default_factory=ClipScore)
    metaclip: MetaClip = field(default_factory=MetaClip)
    uids: UidList = field(default_factory=UidList)
    classifier: ClassifierFilter = field(default_factory=ClassifierFilter)

    def chosen(self) -> tuple[Filter, ...]:
        """The filters that run, in order.

        Raises:
            SettingError: a step that does not exist.
        """
        known = [name for name, value in vars(self).items() if isinstance(value, Filter)]
        for step in self.steps:
            require(step in known, "steps", step, ", ".join(known))
        return tuple(getattr(self, step) for step in self.steps)
