"""Films of how images came to be, as GIF or MP4."""

import io
import zlib
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.errors import DataError

FilmKind = Literal["gif", "mp4", "none"]
FRAMES_PER_SECOND, LAST_SECONDS = 10, 2
Frame = NDArray[np.uint8]


class Film:
    """Some states of N images: ``numbers`` of steps, and ``frames`` uint8 [N, H, W, 3] of each."""

    def __init__(self, most: int, shown: int) -> None:
        self.most, self.shown = most, shown
        self.numbers: list[int] = []
        self.frames: list[Frame] = []

    @property
    def last(self) -> int:
        """The last step that is in it; -1 for none."""
        return self.numbers[-1] if self.numbers else -1

    def steps(self, steps: int, every: int) -> set[int]:
        """The steps with a frame, ``most`` or fewer: multiples of ``every``, and the last one."""
        if self.most == 1:
            return {steps}
        times = max(1, -(-steps // (every * (self.most - 1))))
        return {*range(0, steps, every * times), steps}

    def add(self, step: int, images: Tensor) -> None:
        """Add images float [N, 3, H, W], 0 to 1; drops frames of this and later steps, since the loop went back."""
        while self.numbers and self.last >= step:
            del self.numbers[-1], self.frames[-1]
        pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8)
        self.numbers.append(step)
        self.frames.append(pixels.permute(0, 2, 3, 1).cpu().numpy())

    def content(self) -> bytes:
        """All frames as bytes of numpy."""
        stream = io.BytesIO()
        frames = np.stack(self.frames) if self.frames else np.empty(0, np.uint8)
        np.savez_compressed(stream, numbers=np.array(self.numbers, np.int64), frames=frames)
        return stream.getvalue()

    def read(self, content: bytes, step: int) -> None:
        """The frames of :meth:`content` up to ``step``; raises ``DataError`` for other bytes."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                numbers, frames = stored["numbers"].tolist(), stored["frames"]
        except (ValueError, OSError, LookupError, EOFError, BadZipFile, zlib.error) as error:
            raise DataError(f"this is no film of a checkpoint ({error})") from error
        kept = [place for place, number in enumerate(numbers) if number <= step]
        self.numbers, self.frames = [numbers[place] for place in kept], [frames[place] for place in kept]

    def frames_of(self, image: int, end: int) -> list[tuple[int, Frame]]:
        """The frames of one image with their steps; ``end`` is its last step, after which it has not changed."""
        before = [place for place, number in enumerate(self.numbers) if number < end]
        return [*((self.numbers[place], self.frames[place][image]) for place in before), (end, self.frames[-1][image])]

    def chosen(self, image: int, end: int) -> list[tuple[int, Frame]]:
        """About ``shown`` of :meth:`frames_of`, evenly over the film; the last one is among them."""
        frames = self.frames_of(image, end)
        return [frames[place] for place in np.unique(np.linspace(len(frames) - 1, 0, self.shown).round().astype(int))]

    def encoded(self, image: int, end: int, kind: FilmKind) -> bytes:
        """The film of :meth:`frames_of`; its last frame stays for two seconds."""
        frames = [frame for _, frame in self.frames_of(image, end)]
        return _gif(frames) if kind == "gif" else _mp4(frames)


def _gif(frames: list[Frame]) -> bytes:
    stream, pictures = io.BytesIO(), [Image.fromarray(frame) for frame in frames]
    times = [1000 // FRAMES_PER_SECOND] * (len(frames) - 1) + [1000 * LAST_SECONDS]
    pictures[0].save(stream, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    return stream.getvalue()


def _mp4(frames: list[Frame]) -> bytes:
    import av

    stream = io.BytesIO()
    height, width = (side // 2 * 2 for side in frames[0].shape[:2])  # its colours have half the resolution
    with av.open(stream, "w", format="mp4") as file:
        video: Any = file.add_stream("h264", rate=FRAMES_PER_SECOND)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        for frame in [*frames, *frames[-1:] * (FRAMES_PER_SECOND * LAST_SECONDS)]:
            pixels = np.ascontiguousarray(frame[:height, :width])
            file.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(video.encode())
    return stream.getvalue()
