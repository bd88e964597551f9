"""A folder with one sub-folder a class, read as torchvision reads it."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from service.errors import InvalidRequest
from service.labelled.folder import map_labels, read_folder
from tests.unprivileged import as_nobody, open_folder

__all__ = ["open_folder"]


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"an image, for all that a name says")
    return root


def test_classes_and_images_are_those_of_torchvision(tmp_path: Path) -> None:
    root = put(tmp_path, "b/2.png", "b/1.JPG", "10/x.webp", "2/below/deep/y.tiff", "A/z.bmp")

    found, theirs = read_folder(root), ImageFolder(str(root))

    assert list(found.classes) == theirs.classes == ["10", "2", "A", "b"]
    assert [(str(path), i) for i, paths in enumerate(found.classes.values()) for path in paths] == theirs.samples
    assert not found.skipped


def test_what_is_no_image_of_a_class_is_left_out_with_its_reason(tmp_path: Path) -> None:
    root = put(tmp_path, "cat/1.png", "cat/notes.txt", "stray.png", "cat/.hidden.png", ".cache/2.png", "dog/readme")
    os.mkfifo(root / "cat" / "pipe.png")
    (root / "cat" / "gone.png").symlink_to(root / "nowhere")

    found = read_folder(root)

    assert {name: [path.name for path in paths] for name, paths in found.classes.items()} == {
        "cat": ["1.png"],
        "dog": [],
    }
    assert {(Path(each.path).name, each.reason) for each in found.skipped} == {
        ("stray.png", "in no class's folder"),
        ("notes.txt", "its name is no image's"),
        ("readme", "its name is no image's"),
        ("pipe.png", "no regular file"),
        ("gone.png", "No such file or directory"),
    }


def test_a_folder_that_can_not_be_read_is_named_and_the_others_are_read(open_folder: Path) -> None:
    put(open_folder, "cat/1.png", "dog/1.png", "dog/locked/2.png")
    (open_folder / "dog" / "locked").chmod(0)
    try:
        found = as_nobody(
            "from service.labelled.folder import read_folder",
            "found = read_folder(root)\n"
            "print(json.dumps([{k: len(v) for k, v in found.classes.items()}, [tuple(vars_) for vars_ in "
            "[(each.path, each.reason) for each in found.skipped]]]))",
            open_folder,
        )
    finally:
        (open_folder / "dog" / "locked").chmod(0o755)

    assert found == [{"cat": 1, "dog": 1}, [[str(open_folder / "dog" / "locked"), "Permission denied"]]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no sub-folder has images"),
        (["1.png", "2.png"], "no sub-folder has images .*1.png: in no class's folder"),
        (["train/cat/1.png", "test/cat/2.png"], "its sub-folders 'test', 'train' are no classes; name one of them"),
    ],
)
def test_a_folder_without_classes_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_folder(put(tmp_path, *names))


@pytest.mark.parametrize("name", ["nowhere", "file.png"])
def test_what_is_no_folder_is_refused_with_what_to_name(tmp_path: Path, name: str) -> None:
    put(tmp_path, "file.png")

    with pytest.raises(InvalidRequest, match="name a folder that has one sub-folder for each class"):
        read_folder(tmp_path / name)


@pytest.mark.parametrize(
    ("folders", "labels", "how", "ids", "unmatched"),
    [
        (["cat", "dog"], ["dog", "cat"], "name", {"cat": 1, "dog": 0}, []),
        (["Great_Tit", "owl-barn"], ["Owl Barn", "great tit"], "name", {"Great_Tit": 1, "owl-barn": 0}, []),
        (["tench"], ["tench, Tinca tinca", "goldfish"], "name", {"tench": 0}, []),
        (["cat", "cow"], ["dog", "cat"], "name", {"cat": 1}, ["cow"]),
        (["Cat", "cat"], ["dog", "cat"], "name", {"cat": 1}, ["Cat"]),
        (["b", "z"], ["class 0", "class 1"], "order", {"b": 0, "z": 1}, []),
        (["0", "2"], ["class 0", "class 1", "class 2"], "number", {"0": 0, "2": 2}, []),
        (["10", "2"], [*"0123456789", "10"], "name", {"10": 10, "2": 2}, []),
    ],
)  # fmt: skip
def test_sub_folders_stand_for_labels_by_name_then_by_order_then_by_number(
    folders: Sequence[str], labels: Sequence[str], how: str, ids: dict[str, int], unmatched: list[str]
) -> None:
    mapped = map_labels(folders, labels)

    assert (mapped.how, dict(mapped.ids), list(mapped.unmatched)) == (how, ids, unmatched)


@pytest.mark.parametrize(
    ("folders", "labels"),
    [(["crane"], ["crane", "crane"]), (["x", "y"], ["a", "b", "c"]), (["3"], ["class 0", "class 1", "class 2"])],
)
def test_sub_folders_that_could_be_anything_are_refused(folders: Sequence[str], labels: Sequence[str]) -> None:
    with pytest.raises(InvalidRequest, match="rename the folders to labels, or to class numbers from 0"):
        map_labels(folders, labels)


def test_photos_of_phones_are_images(tmp_path: Path) -> None:
    for name in ("a.HEIC", "b.heif", "c.jpg"):
        (path := tmp_path / "birds" / name).parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")

    assert [path.name for path in read_folder(tmp_path).classes["birds"]] == ["a.HEIC", "b.heif", "c.jpg"]
