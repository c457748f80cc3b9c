"""The possible answers of a model that is trained on questions."""

import logging

from pipeline.config import require
from pipeline.loaders.questions import frequent_answers, questions_of
from pipeline.training.run import Run, pinned_data

logger = logging.getLogger(__name__)


def answers_of(run: Run, field: str, most: int, least: int = 1) -> tuple[str, ...]:
    """The ``most`` frequent answers of the run's data, each to ``least`` questions or more in ``field``.

    A run that is resumed has those of its first start, even if its data set has grown since.

    Raises:
        SettingError: fewer than two answers, or data without the field.
    """
    answers = frequent_answers(questions_of(pinned_data(run), field), most, least)
    found = f"two or more; {run.data} has questions with fewer answers or none"
    require(len(answers) > 1, "answers", answers, found)
    logger.info("%d possible answers, the most frequent one: %s", len(answers), answers[0])
    return answers
