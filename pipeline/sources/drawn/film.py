"""Videos of moving scenes: frames with the ground, the colours, the light and the noise of one image, as MP4.

H.264 at 8 frames per second, by the encoder in PyAV's wheel; quality varies from video to video, as that of images.
"""

from dataclasses import dataclass, replace

import numpy as np

from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.motion import RATE, Actor, MovingScene, State
from pipeline.sources.drawn.outlines import Pixels
from pipeline.sources.drawn.render import finish, paint_ground, paint_object
from pipeline.sources.drawn.scenes import Scene, SceneObject, finished, make_object

_BEST, _WORST = 16, 32  # x264's constant rate factor
_KEY_SECONDS = (1.0, 2.0, 30.0)  # between key frames


@dataclass(frozen=True, slots=True)
class _Painter:
    """What stays the same in all frames of a clip."""

    moving: MovingScene
    split: str
    seed: int
    index: int

    def draws(self, part: int) -> Draws:
        """The random numbers of a part of every frame: they begin anew in each of them."""
        return Draws(self.seed, self.split, self.index, "film", part)

    def frame(self, ground: Pixels, time: float) -> Pixels:
        image, size = ground.copy(), self.moving.size
        shown = [
            (number, _placed(actor, state, size))
            for number, (actor, state) in enumerate(zip(self.moving.actors, self.moving.states(time), strict=True))
            if state.visible
        ]
        objects = finished([obj for _, obj in shown])
        scene = Scene(size, self.moving.style, self.moving.ground, objects, len(objects) - 1)
        for (number, _), obj in zip(shown, objects, strict=True):
            draws = self.draws(2 + number)
            paint_object(image, obj, scene, draws, rim=draws.chance(0.5))
        return finish(image, self.moving.style, self.draws(1))


def draw_frames(moving: MovingScene, split: str, seed: int, index: int) -> Pixels:
    """All frames of sample ``index``: uint8 [T, size, size, 3], RGB; a pure function of the arguments."""
    painter = _Painter(moving, split, seed, index)
    ground = paint_ground(moving.ground, moving.style, moving.size, painter.draws(0))
    return np.stack([painter.frame(ground, time) for time in moving.times])


def encode_frames(frames: Pixels, draws: Draws) -> bytes:
    """The frames as MP4: the same bytes wherever the same version of PyAV runs."""
    # Imported here: every job loads this source, few need FFmpeg's libraries.
    from av import VideoFrame

    from pipeline.shards.video_writer import Mp4Writer

    quality = _BEST + draws.integer(_WORST - _BEST + 1)
    size = frames.shape[2], frames.shape[1]
    writer = Mp4Writer(size, crf=quality, key_seconds=draws.pick(_KEY_SECONDS), rate=RATE)
    for number, pixels in enumerate(frames):
        shown = VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
        writer.add(shown, number / RATE, (number + 1) / RATE)
    return writer.finish()


def _placed(actor: Actor, state: State, size: int) -> SceneObject:
    pose = replace(actor.pose, radius=actor.pose.radius * state.scale, angle=actor.pose.angle + state.angle)
    return make_object(actor.look, pose, (state.x, state.y), size)
