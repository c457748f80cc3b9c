"""The grammar: captions as people leave them on the web, with the exact place of every phrase.

A caption aims at a length drawn from a log-normal law and adds fragments until it is there: an opening ("a photo of"),
what the image shows, where, how things stand, what has nothing to do with it. Attributes are left out more often than
they are named. A phrase refers to every object that fits its words, which is what makes it checkable.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from pipeline.sources.drawn import world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.relations import PHRASES, relation_between
from pipeline.sources.drawn.scenes import Look, Scene

SHORTEST, LONGEST = 2, 40
"""Words in a caption."""

_MEDIAN_WORDS, _SPREAD = 7.5, 0.62

OPENINGS = ("a picture of", "an image of", "picture of", "image of", "this shows", "here we have", "look at")
CLAUSES = (
    "taken last summer",
    "by an unknown artist",
    "free shipping on all orders",
    "more of this on our page",
    "made for my sister",
    "as seen in the local news",
    "found while cleaning the attic",
    "please do not copy",
    "the best one so far",
    "uploaded by a friend",
    "for sale near the station",
    "from our family album",
    "just an ordinary day",
    "nobody knows who made it",
    "sorry for the late reply",
    "what do you think of it",
    "click to see the rest",
    "one of my favourites",
    "drawn during a boring meeting at work",
    "it took me a whole rainy afternoon to get this right",
)
UNRELATED = (
    "click here to see more of our offers",
    "untitled work",
    "no description available",
    "our summer sale ends on friday",
    "happy birthday to my dear grandmother",
    "join our newsletter today",
    "how to bake bread without an oven",
    "the weather was lovely and the trains were late",
    "screenshot of my desktop",
    "team meeting in the main hall",
    "best deals on garden furniture and free delivery",
    "a long walk through the old town before dinner with all of our friends from school",
)
SWAPS = ("order", "attributes", "relation")
_SIDES = ("left of", "right of", "above", "below")
GENERIC = ("shape", "thing", "object")


@dataclass(frozen=True, slots=True)
class Phrase:
    """``caption[start:end]``: what it names (``object``, ``ground`` or ``style``) and which objects fit it."""

    start: int
    end: int
    kind: str
    objects: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Caption:
    """``truthful`` is False for one that describes another image or none; it has no phrases."""

    text: str
    truthful: bool = True
    phrases: tuple[Phrase, ...] = ()

    def record(self) -> dict[str, object]:
        """As in ``boxes.json``."""
        phrases = [
            {
                "start": phrase.start,
                "end": phrase.end,
                "text": self.text[phrase.start : phrase.end],
                "kind": phrase.kind,
                "objects": list(phrase.objects),
            }
            for phrase in self.phrases
        ]
        return {"caption": self.text, "caption_true": self.truthful, "phrases": phrases}


@dataclass(frozen=True, slots=True)
class Description:
    """What is said of a thing: canonical attribute names (None: not said) and the words that say it."""

    shape: str | None
    variant: str | None
    hypernym: str | None
    colour: str | None
    texture: str | None
    size: str | None
    noun: str
    adjectives: tuple[str, ...]

    def fits(self, look: Look) -> bool:
        """Whether everything that is said holds of ``look``."""
        return (
            self.shape in (None, look.shape)
            and self.variant in (None, look.variant)
            and (self.hypernym is None or self.hypernym == world.noun(look.shape).hypernym)
            and self.colour in (None, look.colour)
            and self.texture in (None, look.texture)
            and self.size in (None, look.size)
        )

    def words(self, many: bool = False) -> str:
        """The noun phrase without an article."""
        return " ".join((*self.adjectives, world.plural(self.noun) if many else self.noun))


@dataclass(slots=True)
class _Line:
    """A caption in the making."""

    text: str = ""
    phrases: list[Phrase] = field(default_factory=list)

    def add(self, words: str) -> None:
        """Append words; a blank goes before them unless they begin with a comma or full stop."""
        if self.text and not words.startswith((",", ".")):
            self.text += " "
        self.text += words

    def phrase(self, words: str, kind: str, objects: Iterable[int] = ()) -> None:
        """Append words that are a phrase."""
        self.add(words)
        self.phrases.append(Phrase(len(self.text) - len(words), len(self.text), kind, tuple(objects)))

    def length(self) -> int:
        return len(self.text.split())


def write_caption(scene: Scene, draws: Draws, wrong: float = world.WRONG_CAPTIONS) -> Caption:
    """A caption for the scene; with the chance ``wrong`` it is not about this one."""
    if draws.chance(wrong):
        return _wrong_caption(scene, draws)
    target = min(max(_MEDIAN_WORDS * math.exp(_SPREAD * draws.normal()), SHORTEST), LONGEST)
    return _dress(_write(scene, draws, round(target)), draws)


def say_relation(scene: Scene, first: int, second: int, relation: str) -> Caption:
    """The plain sentence of the relations set: both things by colour and shape, as in
    "a red star to the left of a blue disc"."""
    line = _Line()
    for index, joint in ((first, None), (second, PHRASES[relation][0])):
        if joint is not None:
            line.add(joint)
        look = scene.things[index].look
        said = f"{look.colour} {look.shape}"
        line.add(article(said))
        line.phrase(said, "object", [index])
    return Caption(line.text, True, tuple(line.phrases))


def swap_words(scene: Scene, first: int, second: int, relation: str, swap: str, draws: Draws) -> str:
    """A false sentence made of the words of :func:`say_relation`, or nearly so.

    ``swap`` is one of :data:`SWAPS`: the two things change places, or exchange their colours, or the relation gives
    way to one along another axis.
    """
    if swap == "order":
        return say_relation(scene, second, first, relation).text
    if swap == "relation":
        other = draws.pick([name for name in _SIDES if name not in _same_axis(relation)])
        return say_relation(scene, first, second, other).text
    one, other_look = scene.things[first].look, scene.things[second].look
    exchanged = {first: replace(one, colour=other_look.colour), second: replace(other_look, colour=one.colour)}
    things = [replace(thing, look=exchanged.get(index, thing.look)) for index, thing in enumerate(scene.things)]
    return say_relation(replace(scene, things=tuple(things)), first, second, relation).text


def _same_axis(relation: str) -> tuple[str, ...]:
    return next((axis for axis in (_SIDES[:2], _SIDES[2:]) if relation in axis), ())


def article(words: str) -> str:
    """ "a" or "an": by the first letter, but for the silent one of "hourglass"."""
    return "an" if words[0] in "aeiou" or words.startswith("hour") else "a"


def describe(look: Look, draws: Draws, named: bool = False, keen: float = 1.0) -> Description:
    """Choose what to say of a thing. ``named`` forbids wider words than the shape's own; ``keen`` scales how readily
    attributes are named."""
    noun = world.noun(look.shape)
    choice = draws.random()
    shape: str | None = look.shape
    variant = hypernym = None
    if look.variant is not None and choice < 0.5:
        variant, words = look.variant, look.variant
    elif choice < 0.75 or (named and choice >= 0.92):
        words = noun.name
    elif choice < 0.92:
        words = draws.pick(noun.synonyms)
    elif choice < 0.97:
        shape, hypernym, words = None, noun.hypernym, noun.hypernym
    else:
        shape, words = None, draws.pick(GENERIC)
    colour = look.colour if draws.chance(0.52 * keen) or shape is None else None
    texture = look.texture if draws.chance((0.08 if look.texture == "plain" else 0.62) * keen) else None
    size = look.size if draws.chance((0.06 if look.size == "medium" else 0.22) * keen) else None
    adjectives = tuple(_adjectives(colour, texture, size, draws))
    return Description(shape, variant, hypernym, colour, texture, size, words, adjectives)


def _adjectives(colour: str | None, texture: str | None, size: str | None, draws: Draws) -> Iterable[str]:
    if size is not None:
        yield draws.pick(_SIZE_WORDS[size])
    if texture is not None:
        yield _TEXTURE_WORDS[texture][0 if draws.chance(0.75) else 1]
    if colour is not None:
        yield colour if draws.chance(0.8) else draws.pick(world.colour(colour).synonyms)


def _write(scene: Scene, draws: Draws, target: int, wrong: bool = False) -> _Line:
    """Fragments until ``target`` words are there; never more than :data:`LONGEST`."""
    line = _Line()
    opened = target >= 5 and draws.chance(0.55)
    if opened:
        _open(line, scene, draws)
    if target < 6 or not draws.chance(0.5) or not _relate_main(line, scene, draws, wrong):
        _tell(line, scene, draws, bare=not opened and draws.chance(0.35), target=target, named=wrong)
    if target - line.length() >= 2 and draws.chance(0.55):
        _place(line, scene, draws)
    content = draws.shuffled(("others", "relation", "count", "relation"))
    for fragment in (*content, *draws.shuffled(("clause", "style", "clause", "clause"))):
        room = target - line.length()
        if room <= 1:
            break
        _extend(line, fragment, scene, draws, room, wrong)
    return line


def _open(line: _Line, scene: Scene, draws: Draws) -> None:
    if draws.chance(0.45):
        line.phrase(draws.pick(_STYLE_WORDS[scene.style]), "style")
    else:
        line.add(draws.pick(OPENINGS))


def _tell(line: _Line, scene: Scene, draws: Draws, bare: bool, target: int, named: bool) -> None:
    """What the image shows: its main thing, or all things of that kind when there are several."""
    look = scene.things[scene.main].look
    said = describe(look, draws, named, keen=1.15 if target < 4 else 1.0)
    if target <= 2 and not said.adjectives and " " not in said.noun:
        said = Description(look.shape, None, None, look.colour, None, None, look.shape, (look.colour,))
    _mention(line, scene, said, draws, bare)


def _mention(line: _Line, scene: Scene, said: Description, draws: Draws, bare: bool = False) -> None:
    """A noun phrase for all that fits ``said``: with its number when that is more than one."""
    fits = _fitting(scene, said)
    if len(fits) > 1:
        number = draws.pick(("some", "several")) if draws.chance(0.1) else world.NUMBER_WORDS[len(fits)]
        line.phrase(f"{number} {said.words(many=True)}", "object", fits)
        return
    words = said.words()
    if not bare:
        line.add("the" if draws.chance(0.12) else article(words))
    elif not line.text and " " not in words:
        line.add(article(words))
    line.phrase(words, "object", fits)


def _place(line: _Line, scene: Scene, draws: Draws) -> None:
    line.phrase(draws.pick(_GROUND_WORDS[scene.ground]), "ground")


def _extend(line: _Line, fragment: str, scene: Scene, draws: Draws, room: int, wrong: bool) -> None:
    """Append one fragment if it applies and fits into some words more than ``room``."""
    trial = _Line(line.text, list(line.phrases))
    if fragment == "clause":
        trial.add(", " + draws.pick(CLAUSES))
    elif fragment == "style" and all(phrase.kind != "style" for phrase in line.phrases):
        trial.add(", " + draws.pick(("in", "from")) + " a collection,")
        trial.phrase(draws.pick(_STYLE_WORDS[scene.style]).removesuffix(" of"), "style")
    elif fragment == "count" and len(scene.things) > 1:
        trial.phrase(f", {world.NUMBER_WORDS[len(scene.things)]} things", "object", range(len(scene.things)))
        _trim_comma(trial)
        trial.add("in all")
    elif fragment == "others" and len(scene.things) > 1:
        _mention_another(trial, scene, draws, wrong)
    elif fragment == "relation" and len(scene.things) > 1:
        _relate(trial, scene, draws, wrong)
    if trial.length() <= min(line.length() + room + 3, LONGEST):
        line.text, line.phrases = trial.text, trial.phrases


def _trim_comma(line: _Line) -> None:
    """The comma that joins a fragment is no part of its phrase."""
    last = line.phrases[-1]
    line.phrases[-1] = Phrase(last.start + 2, last.end, last.kind, last.objects)


def _mention_another(line: _Line, scene: Scene, draws: Draws, wrong: bool) -> None:
    """ "... and a small key": a thing that no phrase has told of yet."""
    told = {index for phrase in line.phrases for index in phrase.objects}
    untold = [index for index in range(len(scene.things)) if index not in told]
    if untold:
        line.add(draws.pick(("and", "with", "next to", ", and also")))
        _mention(line, scene, describe(scene.things[draws.pick(untold)].look, draws, wrong), draws)


def _relate(line: _Line, scene: Scene, draws: Draws, wrong: bool) -> None:
    """ ". The red star is to the left of a key", where both can be told from everything else."""
    first, second = draws.shuffled(range(len(scene.things)))[:2]
    relation = relation_between(scene, first, second)
    if relation is None:
        return
    said = [_single(scene, index, draws, wrong) for index in (first, second)]
    if said[0] is None or said[1] is None:
        return
    joint, verb = draws.pick(((", with", ""), (". There,", "is "), (", and", "is ")))
    line.add(joint)
    line.add("the")
    line.phrase(said[0].words(), "object", [first])
    line.add(verb + draws.pick(PHRASES[relation]))
    line.add(draws.pick(("the", article(said[1].words()))))
    line.phrase(said[1].words(), "object", [second])


def _relate_main(line: _Line, scene: Scene, draws: Draws, wrong: bool) -> bool:
    """ "a red star to the left of a key": the main thing and another, if both can be told from everything else."""
    others = [index for index in range(len(scene.things)) if index != scene.main]
    for second in draws.shuffled(others):
        relation = relation_between(scene, scene.main, second)
        said = [_single(scene, index, draws, wrong) for index in (scene.main, second)] if relation else []
        if relation and said[0] is not None and said[1] is not None:
            line.add(article(said[0].words()))
            line.phrase(said[0].words(), "object", [scene.main])
            line.add(draws.pick(PHRASES[relation]))
            line.add(article(said[1].words()))
            line.phrase(said[1].words(), "object", [second])
            return True
    return False


def _single(scene: Scene, index: int, draws: Draws, named: bool) -> Description | None:
    """A description that fits this thing alone, if two tries find one."""
    for keen in (1.0, 1.6):
        said = describe(scene.things[index].look, draws, named, keen)
        if len(_fitting(scene, said)) == 1:
            return said
    return None


def _fitting(scene: Scene, said: Description) -> list[int]:
    return [index for index, thing in enumerate(scene.things) if said.fits(thing.look)]


def _dress(line: _Line, draws: Draws) -> Caption:
    """Capital letter and full stop as people use them: sometimes."""
    text = line.text
    if draws.chance(0.4):
        text = text[0].upper() + text[1:]
    if draws.chance(0.3):
        text += "."
    return Caption(text, True, tuple(line.phrases))


def _wrong_caption(scene: Scene, draws: Draws) -> Caption:
    """Text about nothing, or about shapes that are not in the image."""
    if draws.chance(0.4):
        return Caption(_dress(_Line(draws.pick(UNRELATED)), draws).text, truthful=False)
    target = min(max(_MEDIAN_WORDS * math.exp(_SPREAD * draws.normal()), SHORTEST), LONGEST)
    line = _write(_elsewhere(scene, draws), draws, round(target), wrong=True)
    return Caption(_dress(line, draws).text, truthful=False)


def _elsewhere(scene: Scene, draws: Draws) -> Scene:
    """The scene with every shape replaced by one that it does not show."""
    shown = {thing.look.shape for thing in scene.things}
    absent = [shape for shape in world.SHAPE_NAMES if shape not in shown]
    things = []
    for thing in scene.things:
        shape = draws.pick(absent)
        names, odds = world.allowed_colours(shape, held_out=False)
        variants = world.noun(shape).variants
        look = replace(
            thing.look,
            shape=shape,
            variant=draws.pick(variants) if variants else None,
            colour=names[draws.weighted(odds)],
        )
        things.append(replace(thing, look=look))
    return replace(scene, things=tuple(things))


def _table(words: Sequence[world.Word]) -> dict[str, tuple[str, ...]]:
    return {word.name: word.words for word in words}


_SIZE_WORDS = _table(world.SIZES)
_TEXTURE_WORDS = _table(world.TEXTURES)
_STYLE_WORDS = _table(world.STYLES)
_GROUND_WORDS = _table(world.GROUNDS)
