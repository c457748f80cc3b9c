"""Scenes that move: objects travel, turn, grow, shrink, blink, collide and part; one to four events in a clip.

Every motion and its opposite show the same frames in the opposite order, with the same probability: to the left and to
the right, up and down, both directions of turning, growing and shrinking, colliding and parting. So a model of single
frames, or of frames without an order, cannot tell them apart.

    motions (and motions_train)   one event; label = motion, balanced
    events                        two to four events in a clip; each timed caption is the name of a motion
    shapes (and shapes_train)     one event; label = shape, balanced: one frame is enough
    seen_actions (and seen_actions_train), unseen_actions
                                  one event of one object; label = "star moving to the left", balanced. A fifth of the
                                  pairs of shape and motion are in unseen_actions alone of these three; each shape and
                                  each motion is in the others, too
    train, val                    one event, or up to three; 5 % wrong captions
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeline.sources.drawn import sets, world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.outlines import outline_of
from pipeline.sources.drawn.scenes import Look, Pose, Wish, sample_look, sample_pose

OPPOSITES = {
    "moving to the right": "moving to the left",
    "moving to the left": "moving to the right",
    "moving up": "moving down",
    "moving down": "moving up",
    "turning clockwise": "turning anticlockwise",
    "turning anticlockwise": "turning clockwise",
    "growing": "shrinking",
    "shrinking": "growing",
    "colliding": "parting",
    "parting": "colliding",
}
MOTIONS = (*OPPOSITES, "blinking", "standing still")
PAIRED = ("colliding", "parting")
"""Motions of two objects."""
ACTION_SPLITS = ("seen_actions", "seen_actions_train", "unseen_actions")
MOTION_SPLITS = ("motions", "motions_train", "events", *ACTION_SPLITS)
"""Splits that have videos only."""
FILMED_SPLITS = ("train", "val", "shapes", "shapes_train", *MOTION_SPLITS)
RATE = 8
"""Frames per second."""
EVENT_SECONDS = 1.0
"""Shortest event of a clip with several."""

# Shapes that look the same after a small turn; their turning cannot be seen.
_ROUND = ("disc", "ring", "gear", "flower", "spiral")
_HELD_OUT = 5  # one of so many pairs of shape and motion is held out
_FORWARD = {"moving to the right": 0, "moving down": 1}
_TURN = (0.25 * math.pi, 0.5 * math.pi)  # slow enough that eight frames show the direction, with steps below 15 degrees
_GROWTH = (1.7, 2.4)
_RADII = {"small": (0.1, 0.13), "medium": (0.15, 0.19)}
_PAIRED_RADIUS = 0.8  # two objects are smaller than one, to have room
_FAR = (0.25, 0.5)  # distance of objects before they collide, as a part of the side
_TOUCHING = 0.85  # distance of objects in touch, as a part of the sum of their largest radii
_ROOM = 0.3  # of the side: the shortest way of a later event
_MOST_HELD = 0.15  # part of an event at its start and at its end without motion


@dataclass(frozen=True, slots=True)
class State:
    """Where an object is (x, y in pixels), its angle in radians, its scale, and whether it is visible."""

    x: float
    y: float
    angle: float = 0.0
    scale: float = 1.0
    visible: bool = True


@dataclass(frozen=True, slots=True)
class Actor:
    """An object: its look, its pose at scale 1, and its state at the start."""

    look: Look
    pose: Pose
    start: State


@dataclass(frozen=True, slots=True)
class Event:
    """A motion from ``begin`` to ``end``, in seconds; ``after`` maps the numbers of its actors to their new states.

    Nothing moves in the first ``held[0]`` and the last ``held[1]`` of its duration. ``blinks`` is the number of times
    that a blinking object vanishes.
    """

    motion: str
    begin: float
    end: float
    after: Mapping[int, State]
    held: tuple[float, float] = (0.0, 0.0)
    blinks: int = 0

    @property
    def actors(self) -> tuple[int, ...]:
        """The numbers of the objects that move."""
        return tuple(self.after)

    def progress(self, time: float) -> float:
        """0 before the motion, 1 after it, in between proportional to time."""
        first, last = self.held
        part = (time - self.begin) / (self.end - self.begin)
        return min(max((part - first) / (1 - first - last), 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class MovingScene:
    """A clip: its objects, the farthest first, ``main`` the number of the one that it is about, and its events."""

    size: int
    seconds: float
    style: str
    ground: str
    actors: tuple[Actor, ...]
    main: int
    events: tuple[Event, ...]

    @property
    def times(self) -> list[float]:
        """Seconds whose state the frames show: the middle of each frame's own time."""
        return [(number + 0.5) / RATE for number in range(max(2, round(self.seconds * RATE)))]

    def states(self, time: float) -> list[State]:
        """The state of each object at a time in seconds."""
        states = [actor.start for actor in self.actors]
        for event in self.events:
            if time < event.begin:
                break
            done = event.progress(time)
            for number, after in event.after.items():
                states[number] = _between(states[number], after, done)
                if math.cos(2 * math.pi * event.blinks * done) < 0:
                    states[number] = replace(states[number], visible=False)
        return states


def moving_scene(split: str, draws: Draws, index: int, size: int, seconds: float) -> MovingScene:
    """The scene of sample ``index`` of a split: a pure function of its arguments."""
    shape: str | None
    if split in ACTION_SPLITS:
        pairs = actions(unseen=split == "unseen_actions")
        shape, first = pairs[index % len(pairs)]
    else:
        first = MOTIONS[index % len(MOTIONS)] if split in ("motions", "motions_train") else draws.pick(MOTIONS)
        shape = sets.wanted_class(split, index) if split not in MOTION_SPLITS else None
    if shape in _ROUND and first.startswith("turning"):
        first = "growing" if first == "turning clockwise" else "shrinking"
    stage = _Stage(draws, _cast(draws, first, shape, size), size)
    count = _count(split, draws, seconds)
    cuts = _cuts(draws, count, seconds)
    events = [stage.event(first, *cuts[:2])]
    for begin, end in zip(cuts[1:], cuts[2:], strict=False):
        events.append(stage.event(draws.pick(stage.possible(events[-1])), begin, end))
    styles = world.seen_styles()
    style = styles[draws.weighted(world.cumulate(world.STYLE_FREQUENCIES[name] for name in styles))]
    ground = draws.pick(world.GROUND_NAMES)
    return MovingScene(size, seconds, style, ground, tuple(stage.actors), stage.main, tuple(events))


@functools.cache
def actions(unseen: bool) -> tuple[tuple[str, str], ...]:
    """The pairs of a shape and a motion of one object that the splits of actions show, or that are held out."""
    singles = [motion for motion in MOTIONS if motion not in PAIRED]
    return tuple(
        (shape, motion)
        for number, shape in enumerate(world.SHAPE_NAMES)
        for place, motion in enumerate(singles)
        if not (shape in _ROUND and motion.startswith("turning")) and ((number + place) % _HELD_OUT == 0) == unseen
    )


def action_name(shape: str, motion: str) -> str:
    """ "star moving to the left" """
    return f"{shape} {motion}"


def _count(split: str, draws: Draws, seconds: float) -> int:
    """Number of events: as many as the split asks for and the clip has time for."""
    room = max(1, int(seconds / EVENT_SECONDS))
    if split == "events":
        return min(2 + draws.integer(3), room)
    if split in sets.CAPTIONED:
        return min(draws.weighted((0.7, 0.9, 1.0)) + 1, room)
    return 1


def _cuts(draws: Draws, count: int, seconds: float) -> list[float]:
    """The times between events; each event lasts :data:`EVENT_SECONDS` or more, where there is more than one."""
    spare = max(0.0, seconds - count * EVENT_SECONDS)
    parts = sorted(draws.random() for _ in range(count - 1))
    return [0.0, *(spare * part + (number + 1) * EVENT_SECONDS for number, part in enumerate(parts)), seconds]


def _cast(draws: Draws, motion: str, shape: str | None, size: int) -> list[Actor]:
    """The objects without their places: still distractors first, then those of the first motion, the main one last."""
    others, movers = draws.integer(3), 2 if motion in PAIRED else 1
    looks: list[Look] = []
    while len(looks) < movers + others:
        wish = Wish(shape=None if looks else shape)
        look = sample_look(draws, wish, "medium" if len(looks) < movers else "small")
        unseen = not looks and motion.startswith("turning") and look.shape in _ROUND
        if not unseen and not any(_alike(look, one) for one in looks):
            looks.append(look)
    looks.reverse()
    scale = size * (_PAIRED_RADIUS if motion in PAIRED else 1.0)
    radii = [draws.uniform(*_RADII[look.size]) * scale for look in looks]
    poses = [sample_pose(draws, look.shape, radius) for look, radius in zip(looks, radii, strict=True)]
    return [Actor(look, pose, State(0.0, 0.0)) for look, pose in zip(looks, poses, strict=True)]


def _alike(one: Look, other: Look) -> bool:
    """Two objects of one clip differ in shape and colour, so that a caption means one of them."""
    return one.shape == other.shape or one.colour == other.colour


class _Stage:
    """Places the actors and makes events one after the other; the state of each actor carries on."""

    def __init__(self, draws: Draws, actors: list[Actor], size: int) -> None:
        self._draws, self._size = draws, size
        self.actors, self.main = actors, len(actors) - 1
        self._placed = False
        self._touching: dict[int, State] = {}
        self._apart: dict[int, State] = {}
        self._states = [self._anywhere(number) for number in range(len(actors))]
        self.actors = [replace(one, start=state) for one, state in zip(actors, self._states, strict=True)]

    def event(self, motion: str, begin: float, end: float) -> Event:
        """The next event; before the first one the actors move to where it begins."""
        draws = self._draws
        before, after, blinks = self._change(motion)
        if not self._placed:
            for number, state in before.items():
                self._states[number] = state
                self.actors[number] = replace(self.actors[number], start=state)
        self._placed = True
        self._states = [after.get(number, state) for number, state in enumerate(self._states)]
        held = (draws.uniform(0.0, _MOST_HELD), draws.uniform(0.0, _MOST_HELD))
        return Event(motion, begin, end, after, held, blinks)

    def possible(self, last: Event) -> list[str]:
        """The motions that may follow an event: others than it, with room for them."""
        here, size = self._states[self.main], self._size
        reach = self._reach(self.main, here.scale)
        room = {
            "moving to the right": size - reach - here.x,
            "moving to the left": here.x - reach,
            "moving down": size - reach - here.y,
            "moving up": here.y - reach,
        }
        found = [motion for motion, pixels in room.items() if pixels >= _ROOM * size]
        if self.actors[self.main].look.shape not in _ROUND:
            found += ["turning clockwise", "turning anticlockwise"]
        found += ["growing"] if here.scale <= 1 else []
        found += ["shrinking"] if here.scale >= 1 else []
        found += [OPPOSITES[last.motion]] if last.motion in PAIRED else []
        return [motion for motion in (*found, "blinking", "standing still") if motion != last.motion]

    def _change(self, motion: str) -> tuple[dict[int, State], dict[int, State], int]:
        """The states of the actors before and after a motion, and how often they vanish."""
        if motion in PAIRED:
            return self._meeting(motion)
        here = self._states[self.main]
        if motion.startswith("moving"):
            before, after = self._travel(motion, here)
        elif motion.startswith("turning"):
            # y points down, so a growing angle is clockwise. The first turn has its middle at the pose's angle, so that
            # both directions show the same angles.
            turn = self._draws.uniform(*_TURN) * (1 if motion == "turning clockwise" else -1)
            before = here if self._placed else replace(here, angle=here.angle - turn / 2)
            after = replace(before, angle=before.angle + turn)
        elif motion in ("growing", "shrinking"):
            before, after = self._resized(motion, here)
        else:
            return {self.main: here}, {self.main: here}, 2 + self._draws.integer(3) if motion == "blinking" else 0
        return {self.main: before}, {self.main: after}, 0

    def _travel(self, motion: str, here: State) -> tuple[State, State]:
        """Across most of the image along one axis; later events go on from where the object is, or come back."""
        axis = 0 if motion in ("moving to the right", "moving to the left") else 1
        low, high = self._reach(self.main, here.scale), self._size - self._reach(self.main, here.scale)
        near = self._draws.uniform(low, low + 0.12 * self._size)
        far = self._draws.uniform(high - 0.12 * self._size, high)
        first, last = (near, far) if motion in _FORWARD else (far, near)
        if self._placed:
            first = here.x if axis == 0 else here.y
            edge = high if motion in _FORWARD else low
            last = first + (edge - first) * self._draws.uniform(0.8, 1.0)
        if axis == 0:
            return replace(here, x=first), replace(here, x=last)
        return replace(here, y=first), replace(here, y=last)

    def _resized(self, motion: str, here: State) -> tuple[State, State]:
        ratio = self._draws.uniform(*_GROWTH)
        small, large = 1 / math.sqrt(ratio), math.sqrt(ratio)
        room = min(here.x, here.y, self._size - here.x, self._size - here.y) / self._reach(self.main, 1.0)
        large = min(large, max(room, small * 1.3))
        first, last = (small, large) if motion == "growing" else (large, small)
        if self._placed:
            first, last = here.scale, here.scale * (last / first)
        return replace(here, scale=first), replace(here, scale=last)

    def _meeting(self, motion: str) -> tuple[dict[int, State], dict[int, State], int]:
        """Two objects on a line through the image, apart or in touch; both move, in opposite directions."""
        pair = (self.main, self.main - 1)
        here = {number: self._states[number] for number in pair}
        if self._placed:  # back to where they came from
            return here, self._apart if motion == "parting" else self._touching, 0
        angle = self._draws.uniform(0.0, 2 * math.pi)
        direction = np.array([math.cos(angle), math.sin(angle)])
        radii = [self._reach(number, here[number].scale) for number in pair]
        touching = _TOUCHING * sum(radii)
        apart = touching + self._draws.uniform(*_FAR) * self._size
        middle = np.array([self._size / 2 + self._draws.uniform(-0.06, 0.06) * self._size for _ in range(2)])

        def placed(distance: float) -> dict[int, State]:
            places = np.stack([middle - direction * distance / 2, middle + direction * distance / 2])
            edges = np.array(radii)[:, None]
            inside = np.clip(places, edges, self._size - edges).tolist()
            return {number: replace(here[number], x=x, y=y) for number, (x, y) in zip(pair, inside, strict=True)}

        self._touching, self._apart = placed(touching), placed(apart)
        if motion == "colliding":
            return self._apart, self._touching, 0
        return self._touching, self._apart, 0

    def _anywhere(self, number: int) -> State:
        reach = self._reach(number, 1.0)
        x, y = (self._draws.uniform(reach, self._size - reach) for _ in range(2))
        return State(x, y)

    def _reach(self, number: int, scale: float) -> float:
        """Largest distance of the outline from its centre, at any angle, in pixels."""
        actor = self.actors[number]
        points = outline_of(actor.look.shape, actor.look.variant).points @ actor.pose.matrix().T
        return min(scale * float(np.hypot(*points.T).max()) + 1.0, 0.48 * self._size)


def _between(before: State, after: State, done: float) -> State:
    def mixed(first: float, last: float) -> float:
        return first + (last - first) * done

    return State(
        mixed(before.x, after.x),
        mixed(before.y, after.y),
        mixed(before.angle, after.angle),
        mixed(before.scale, after.scale),
    )
