"""What is checked of every subject before anything is drawn, without a model's forward pass."""

from collections.abc import Sequence

from pipeline.generation.guides import Guide
from pipeline.generation.method import GenerationMethod, Subject
from pipeline.loaders.images import image_at


def check_subject(
    method: GenerationMethod, subject: Subject, guides: Sequence[Guide], judge: Guide, readable: set[str]
) -> None:
    """Lengths of texts, files of image prompts, and what the method says of the subject.

    ``readable`` are the files that were read before; new ones are added.

    Raises:
        SettingError: a prompt or an image that does not fit.
    """
    texts = [one for one in subject.prompts if not one.image]
    for guide in guides:
        guide.check_lengths([one.text for one in texts])
    judge.check_lengths([one.text for one in texts if one.weight > 0])
    for one in subject.prompts:
        if one.image and one.image not in readable:
            image_at(one.image)
            readable.add(one.image)
    method.check(subject)
