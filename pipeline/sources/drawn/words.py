"""The grammar: captions like those on the web, with the exact span of every phrase.

A caption has a target length from a log-normal distribution. Fragments are added up to it: an opening ("a photo of"),
the main object, the ground, further objects, relations, unrelated clauses. Most attributes are left out. A phrase
refers to every object that matches it, so a test can check it.
"""

import math
import re
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
_JOINTS = ("and with next to also there is", "the a an some several things in all from collection aerial view of many")


@dataclass(frozen=True, slots=True)
class Phrase:
    """``caption[start:end]``: its kind (``object``, ``ground`` or ``style``) and the objects that match it."""

    start: int
    end: int
    kind: str
    objects: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption; ``truthful`` is False where it describes another image or none, and has no phrases."""

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
    """A description of an object: canonical attribute names (None = not named) and the words for them."""

    shape: str | None
    variant: str | None
    hypernym: str | None
    colour: str | None
    texture: str | None
    size: str | None
    noun: str
    adjectives: tuple[str, ...]

    def fits(self, look: Look) -> bool:
        """Whether ``look`` matches every named attribute."""
        return (
            self.shape in (None, look.shape)
            and self.variant in (None, look.variant)
            and (self.hypernym is None or self.hypernym == world.noun(look.shape).hypernym)
            and self.colour in (None, look.colour)
            and self.texture in (None, look.texture)
            and self.size in (None, look.size)
        )

    def words(self, many: bool = False) -> str:
        """The noun phrase without an article; plural with ``many``."""
        return " ".join((*self.adjectives, world.plural(self.noun) if many else self.noun))


@dataclass(slots=True)
class _Line:
    """A caption under construction."""

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
    """A caption for the scene; with probability ``wrong`` it describes another image or none."""
    if draws.chance(wrong):
        return _wrong_caption(scene, draws)
    target = min(max(_MEDIAN_WORDS * math.exp(_SPREAD * draws.normal()), SHORTEST), LONGEST)
    return _dress(_write(scene, draws, round(target)), draws)


def say_relation(scene: Scene, first: int, second: int, relation: str) -> Caption:
    """The sentence of the relations set, with colour and shape of both objects:
    "a red star to the left of a blue disc"."""
    line = _Line()
    for index, joint in ((first, None), (second, PHRASES[relation][0])):
        if joint is not None:
            line.add(joint)
        look = scene.objects[index].look
        said = f"{look.colour} {look.shape}"
        line.add(article(said))
        line.phrase(said, "object", [index])
    return Caption(line.text, True, tuple(line.phrases))


def swap_words(scene: Scene, first: int, second: int, relation: str, swap: str, draws: Draws) -> str:
    """A false sentence with the words of :func:`say_relation`, or nearly so.

    ``swap`` is one of :data:`SWAPS`: swap the two objects, swap their colours, or replace the relation by one along
    another axis.
    """
    if swap == "order":
        return say_relation(scene, second, first, relation).text
    if swap == "relation":
        other = draws.pick([name for name in _SIDES if name not in _same_axis(relation)])
        return say_relation(scene, first, second, other).text
    one, other_look = scene.objects[first].look, scene.objects[second].look
    exchanged = {first: replace(one, colour=other_look.colour), second: replace(other_look, colour=one.colour)}
    objects = [replace(obj, look=exchanged.get(index, obj.look)) for index, obj in enumerate(scene.objects)]
    return say_relation(replace(scene, objects=tuple(objects)), first, second, relation).text


def _same_axis(relation: str) -> tuple[str, ...]:
    return next((axis for axis in (_SIDES[:2], _SIDES[2:]) if relation in axis), ())


def article(words: str) -> str:
    """ "a" or "an": by the first letter, except "hourglass" with its silent h."""
    return "an" if words[0] in "aeiou" or words.startswith("hour") else "a"


def describe(look: Look, draws: Draws, named: bool = False, keen: float = 1.0) -> Description:
    """Choose a description of an object.

    ``named`` excludes words more general than the shape's own; ``keen`` scales the probabilities of attributes."""
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
    """Add fragments up to about ``target`` words, at most :data:`LONGEST`."""
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
    """Name the main object, or all objects that match its description."""
    look = scene.objects[scene.main].look
    said = describe(look, draws, named, keen=1.15 if target < 4 else 1.0)
    if target <= 2 and not said.adjectives and " " not in said.noun:
        said = Description(look.shape, None, None, look.colour, None, None, look.shape, (look.colour,))
    _mention(line, scene, said, draws, bare)


def _mention(line: _Line, scene: Scene, said: Description, draws: Draws, bare: bool = False) -> None:
    """Add a noun phrase for all objects that match ``said``, with their number if there are several."""
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
    """Append one fragment if it applies and has at most three words more than ``room``."""
    trial = _Line(line.text, list(line.phrases))
    if fragment == "clause":
        trial.add(", " + draws.pick(CLAUSES))
    elif fragment == "style" and all(phrase.kind != "style" for phrase in line.phrases):
        trial.add(", " + draws.pick(("in", "from")) + " a collection,")
        trial.phrase(draws.pick(_STYLE_WORDS[scene.style]).removesuffix(" of"), "style")
    elif fragment == "count" and len(scene.objects) > 1:
        trial.phrase(f", {world.NUMBER_WORDS[len(scene.objects)]} things", "object", range(len(scene.objects)))
        _trim_comma(trial)
        trial.add("in all")
    elif fragment == "others" and len(scene.objects) > 1:
        _mention_another(trial, scene, draws, wrong)
    elif fragment == "relation" and len(scene.objects) > 1:
        _relate(trial, scene, draws, wrong)
    if trial.length() <= min(line.length() + room + 3, LONGEST):
        line.text, line.phrases = trial.text, trial.phrases


def _trim_comma(line: _Line) -> None:
    """Take the joining comma out of the last phrase's span."""
    last = line.phrases[-1]
    line.phrases[-1] = Phrase(last.start + 2, last.end, last.kind, last.objects)


def _mention_another(line: _Line, scene: Scene, draws: Draws, wrong: bool) -> None:
    """ "... and a small key": an object that no phrase mentions yet."""
    mentioned = {index for phrase in line.phrases for index in phrase.objects}
    others = [index for index in range(len(scene.objects)) if index not in mentioned]
    if others:
        line.add(draws.pick(("and", "with", "next to", ", and also")))
        _mention(line, scene, describe(scene.objects[draws.pick(others)].look, draws, wrong), draws)


def _relate(line: _Line, scene: Scene, draws: Draws, wrong: bool) -> None:
    """ ". The red star is to the left of a key", if both descriptions are unique in the scene."""
    first, second = draws.shuffled(range(len(scene.objects)))[:2]
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
    """ "a red star to the left of a key": the main object and another, if both descriptions are unique."""
    others = [index for index in range(len(scene.objects)) if index != scene.main]
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
    """A description that matches this object only, or None after two tries."""
    for keen in (1.0, 1.6):
        said = describe(scene.objects[index].look, draws, named, keen)
        if len(_fitting(scene, said)) == 1:
            return said
    return None


def _fitting(scene: Scene, said: Description) -> list[int]:
    return [index for index, obj in enumerate(scene.objects) if said.fits(obj.look)]


def _dress(line: _Line, draws: Draws) -> Caption:
    return Caption(dressed(line.text, draws), True, tuple(line.phrases))


def dressed(text: str, draws: Draws) -> str:
    """Sometimes begin with a capital letter, sometimes end with a full stop."""
    text = text[0].upper() + text[1:] if draws.chance(0.4) else text
    return f"{text}." if draws.chance(0.3) else text


def _wrong_caption(scene: Scene, draws: Draws) -> Caption:
    """Unrelated text, or a caption of shapes that are not in the image."""
    if draws.chance(0.4):
        return Caption(_dress(_Line(draws.pick(UNRELATED)), draws).text, truthful=False)
    target = min(max(_MEDIAN_WORDS * math.exp(_SPREAD * draws.normal()), SHORTEST), LONGEST)
    line = _write(_elsewhere(scene, draws), draws, round(target), wrong=True)
    return Caption(_dress(line, draws).text, truthful=False)


def _elsewhere(scene: Scene, draws: Draws) -> Scene:
    """The scene with every shape replaced by one that is not in it."""
    shown = {obj.look.shape for obj in scene.objects}
    absent = [shape for shape in world.SHAPE_NAMES if shape not in shown]
    objects = []
    for obj in scene.objects:
        shape = draws.pick(absent)
        names, odds = world.allowed_colours(shape, held_out=False)
        variants = world.noun(shape).variants
        look = replace(
            obj.look,
            shape=shape,
            variant=draws.pick(variants) if variants else None,
            colour=names[draws.weighted(odds)],
        )
        objects.append(replace(obj, look=look))
    return replace(scene, objects=tuple(objects))


def vocabulary() -> frozenset[str]:
    """Every word of the grammar's tables in lower case: what a tokenizer of these captions has to know."""
    said = [*OPENINGS, *CLAUSES, *UNRELATED, *GENERIC, *world.NUMBER_WORDS, *_JOINTS]
    said += [text for phrases in PHRASES.values() for text in phrases]
    said += [word for noun in world.SHAPES for word in (noun.name, *noun.synonyms, noun.hypernym, *noun.variants)]
    said += [word for colour in world.COLOURS for word in (colour.name, *colour.synonyms)]
    tables = (_SIZE_WORDS, _TEXTURE_WORDS, _STYLE_WORDS, _GROUND_WORDS)
    said += [word for table in tables for words in table.values() for word in words]
    return frozenset(word.lower() for text in said for word in re.findall(r"[^\W_]+", text))


def _table(words: Sequence[world.Word]) -> dict[str, tuple[str, ...]]:
    return {word.name: word.words for word in words}


_SIZE_WORDS = _table(world.SIZES)
_TEXTURE_WORDS = _table(world.TEXTURES)
_STYLE_WORDS = _table(world.STYLES)
_GROUND_WORDS = _table(world.GROUNDS)
