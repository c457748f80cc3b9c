"""Several annotators who answer the questions about a scene, not always alike.

Most give the right answer, some in other words (a synonym, an article, a figure for a number), and a few a wrong one of
the same kind: another colour, one more or less, the other of two shapes. Some questions are harder than others.
"""

from collections.abc import Callable

from pipeline.sources.drawn import world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.questions import Question
from pipeline.sources.drawn.words import article

MOST_ANNOTATORS = 10
WRONG = (0.0, 0.25)
"""Range of the probability that an annotator of a question is wrong."""
OTHER_WORDS = 0.2
"""Probability that an annotator who is right uses other words."""


def answers_of(question: Question, draws: Draws, count: int) -> tuple[str, ...]:
    """The answers of ``count`` annotators: a pure function of its arguments."""
    wrong = draws.uniform(*WRONG)
    return tuple(_answer(question, draws, wrong) for _ in range(count))


def _answer(question: Question, draws: Draws, wrong: float) -> str:
    if draws.chance(wrong):
        return draws.pick(_WRONG[question.kind](question))
    return draws.pick(other_words(question)) if draws.chance(OTHER_WORDS) else question.answer


def other_words(question: Question) -> tuple[str, ...]:
    """What is as right as the answer, the answer itself if there is nothing else."""
    answer = question.answer
    if question.kind == "colour":
        return next(one.synonyms for one in world.COLOURS if one.name == answer) or (answer,)
    if question.kind in ("shape", "side"):
        return (f"{article(answer)} {answer}", f"the {answer}", *world.noun(answer).synonyms)
    if question.kind == "count":
        return (str(world.NUMBER_WORDS.index(answer)),)
    return (answer.capitalize(), f"{answer}.")


def _other(names: tuple[str, ...]) -> Callable[[Question], tuple[str, ...]]:
    return lambda question: tuple(name for name in names if name != question.answer)


def _near(question: Question) -> tuple[str, ...]:
    """One more or one less."""
    number = world.NUMBER_WORDS.index(question.answer)
    return tuple(world.NUMBER_WORDS[n] for n in (number - 1, number + 1) if 0 <= n < len(world.NUMBER_WORDS))


def _other_side(question: Question) -> tuple[str, ...]:
    """The other shape that the question names."""
    first, second = question.question.removesuffix("?").partition(", the ")[2].split(" or the ")
    return (second,) if question.answer == first else (first,)


_WRONG: dict[str, Callable[[Question], tuple[str, ...]]] = {
    "colour": _other(world.COLOUR_NAMES),
    "texture": _other(tuple(one.name for one in world.TEXTURES)),
    "shape": _other(world.SHAPE_NAMES),
    "count": _near,
    "side": _other_side,
    "presence": _other(("yes", "no")),
    "style": _other(tuple(world.STYLE_CLASSES.values())),
}
