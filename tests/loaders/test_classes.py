"""Which classes a detector is trained on: a card's or the snapshots' own, without the novel ones."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from pipeline.dataset import load_card
from pipeline.errors import SettingError, SnapshotError
from pipeline.loaders.classes import base_classes, dataset_classes
from pipeline.shards.snapshot import Snapshot, publish_shards
from pipeline.shards.storage import Folder

Make = Callable[..., Snapshot]


def telling(plain: Snapshot, classes: Any) -> str:
    """A snapshot with the same samples whose source knew its classes."""
    made = publish_shards(
        Folder(plain.folder),
        plain.shards,
        fields=plain.fields,
        card=None,
        options={"classes": classes},
        rows=1,
        dropped={},
        always=True,
    )
    return made.uri


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ({"cat": "f", "dog": "r", "cow": "c"}, ("cat", "cow")),
        ({"cat": "novel", "dog": "base"}, ("dog",)),
        ({"cat": "", "dog": ""}, ("cat", "dog")),
    ],
)
def test_the_data_say_which_classes_are_base(
    make_snapshot: Make, classes: Mapping[str, str], names: tuple[str]
) -> None:
    assert base_classes("data", telling(make_snapshot((1,)), classes)) == names


def test_a_mixture_has_the_classes_of_all(make_snapshot: Make) -> None:
    first = telling(make_snapshot((1,)), {"cat": "f", "dog": "c"})
    second = telling(make_snapshot((1,)), {"cow": "c", "dog": "c", "emu": "r"})
    assert base_classes("data", f"{first}=0.5,{second}=0.5") == ("cat", "dog", "cow")


def test_a_class_of_a_mixture_has_the_names_of_all(make_snapshot: Make) -> None:
    first = telling(make_snapshot((1,)), {"couch": "", "Hot_dog": "f"})
    second = telling(make_snapshot((1,)), {"couch; sofa": "f", "hot dog": "c", "Couch; settee": "c"})
    assert base_classes("data", f"{first}=0.5,{second}=0.5") == ("couch; sofa; settee", "Hot_dog")


def test_a_card_tells_without_data() -> None:
    whole = load_card("coco_ovd_all")
    assert base_classes("coco_ovd_all", "") == tuple(one for one in whole.classes if one not in whole.novel)
    assert set(base_classes("coco_ovd_all", "")) == set(base_classes("coco_ovd_base", ""))
    assert base_classes("", "") == ()


def test_data_that_tell_nothing_are_said_so(make_snapshot: Make) -> None:
    plain = make_snapshot((1,))
    with pytest.raises(SettingError, match="classes: got 'data', .*from a source with classes"):
        base_classes("data", plain.uri, "classes")
    with pytest.raises(SettingError, match="base: got 'lvis'.*a card with classes"):
        base_classes("lvis", plain.uri)
    with pytest.raises(SnapshotError, match="must map names to groups"):
        base_classes("data", telling(plain, ["cat"]))


def test_none_is_no_class(make_snapshot: Make) -> None:
    assert base_classes("none", make_snapshot((1,)).uri) == ()
    with pytest.raises(SettingError, match="or `none`"):
        base_classes("data", make_snapshot((1,)).uri)


def test_a_card_of_other_classes_than_the_data_is_said_so(make_snapshot: Make) -> None:
    """Names are compared as labels are; one that occurs is enough, and data that tell nothing fit every card."""
    base = load_card("coco_ovd_base").classes
    others = telling(make_snapshot((1,)), {"owl": "f", "key": "c"})
    with pytest.raises(
        SettingError, match=r"classes: got 'coco_ovd_base'.*card has person, bicycle, .*data have owl, key"
    ):
        base_classes("coco_ovd_base", others, "classes")
    assert base_classes("coco_ovd_base", telling(make_snapshot((1,)), {"owl": "f", "Person_": "c"})) == base
    assert base_classes("coco_ovd_base", make_snapshot((1,)).uri) == base


def test_each_data_set_has_all_of_its_classes_in_its_own_order(make_snapshot: Make) -> None:
    """Novel ones, too, since they have values in masks; a card stands in for data without classes."""
    first = telling(make_snapshot((1,)), {"cat": "novel", "dog": "base"})
    second = telling(make_snapshot((1,)), {"dog": "", "car": ""})
    plain, whole = make_snapshot((1,)).uri, load_card("coco_ovd_all").classes
    assert dataset_classes("data", f"{first}=1,{second}=2") == (("cat", "dog"), ("dog", "car"))
    assert dataset_classes("coco_ovd_all", f"{first}=1,{plain}=1") == (("cat", "dog"), whole)
    assert dataset_classes("coco_ovd_all", "") == (whole,)
    assert dataset_classes("none", plain) == ((),)
    with pytest.raises(SettingError, match="base: got 'data'.*has none"):
        dataset_classes("data", f"{first}=1,{plain}=1")
