"""Labels and thresholds as people keep them; the truth is torchvision's, pandas' or transformers' own."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from transformers import PvtImageProcessor, PvtV2Config, PvtV2ForImageClassification
from transformers.pipelines.image_classification import ImageClassificationPipeline

from service.acquisition.answers import activation_of, read_labels, read_thresholds, repeated
from service.acquisition.catalogue import imagenet_labels
from service.errors import InvalidRequest
from service.postprocess import scores
from service.store.cards import Answers

NAMES = ("cat", "großer Hund", "owl, barn")


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("labels.txt", [*NAMES]),
        ("labels.txt", ["", "cat ", "", "\tgroßer Hund", "owl, barn", "", " "]),
        ("labels", [*NAMES]),
        ("labels.csv", ["cat", "großer Hund", '"owl, barn"']),
        ("labels.csv", ["label", "cat", "großer Hund", '"owl, barn"']),
        ("labels.csv", ["0,cat", "1,großer Hund", '2,"owl, barn"']),
        ("labels.csv", ["cat,0", "großer Hund,1", '"owl, barn",2']),
        ("labels.csv", ["index,name", '2,"owl, barn"', "0,cat", "", "1,großer Hund", ""]),
        ("labels.csv", ["name,index", "cat,0", "großer Hund,1", '"owl, barn",2']),
        ("labels.csv", ["Class,Id", "cat,0", "großer Hund,1", '"owl, barn",2']),
        ("labels.csv", ['"",name', "0,cat", "1,großer Hund", '2,"owl, barn"']),
        ("labels.csv", ["id,count,label", "0,7,cat", "1,7,großer Hund", '2,9,"owl, barn"']),
        ("labels.csv", ["0;cat", "1;großer Hund", "2;owl, barn"]),
        ("labels.tsv", ["idx\tname", "0\tcat", "1\tgroßer Hund", "2\towl, barn"]),
        ("LABELS.CSV", ["0,cat", "1,großer Hund", '2,"owl, barn"']),
    ],
)  # fmt: skip
def test_labels_are_read_from_lines_and_tables(
    tmp_path: Path, name: str, lines: list[str], newline: str, encoding: str
) -> None:
    assert read_labels(write(tmp_path / name, newline.join(lines), encoding)) == NAMES


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    "content",
    [
        list(NAMES),
        {str(i): name for i, name in enumerate(NAMES)},
        {str(i): NAMES[i] for i in (2, 0, 1)},
        {name: i for i, name in enumerate(NAMES)},
        {"id2label": {str(i): name for i, name in enumerate(NAMES)}, "label2id": {"cat": 0}, "depths": [2, 2]},
        {"label2id": {name: i for i, name in enumerate(NAMES)}},
        {"class_to_idx": {name: i for i, name in enumerate(NAMES)}},
        {"architecture": "pvt_v2_b0", "num_classes": 3, "label_names": list(NAMES)},
    ],
    ids=lambda content: json.dumps(content)[:40],
)
def test_labels_are_read_from_every_json_that_libraries_write(tmp_path: Path, content: Any, encoding: str) -> None:
    assert read_labels(write(tmp_path / "x.json", json.dumps(content, indent=1), encoding)) == NAMES


@pytest.mark.parametrize("content", [{"0": 0, "1": 1, "7": 2}, [0, 1, 7], {"0": "0", "1": "1", "2": "7"}], ids=str)
def test_labels_may_be_numbers_themselves(tmp_path: Path, content: Any) -> None:
    assert read_labels(write(tmp_path / "x.json", json.dumps(content))) == ("0", "1", "7")


@pytest.mark.parametrize("text", ["index,digit\n0,7\n1,0\n2,1", "digit,index\n7,0\n0,1\n1,2", "7,0\n8,1\n9,2"])
def test_a_table_of_two_numbers_is_told_apart_by_its_first_line_or_by_what_can_be_class_numbers(
    tmp_path: Path, text: str
) -> None:
    found = read_labels(write(tmp_path / "x.csv", text))

    assert found == (("7", "8", "9") if text.startswith("7,0\n8") else ("7", "0", "1"))


def test_a_table_that_csv_writes_is_read_back(tmp_path: Path) -> None:
    names = ('say "hi"', "a,b", "c;d", " e", "0")
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("class_id", "class_name"), *enumerate(names)])

    assert read_labels(str(tmp_path / "x.csv")) == tuple(name.strip() for name in names)


def test_folders_are_numbered_as_torchvision_numbers_them(tmp_path: Path) -> None:
    for name in ("b", "B", "10", "9", "ä", "_x", "a b", "Zebra", ".hidden", "-1"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "set" / name / "1.png")
    (tmp_path / "set" / "notes.txt").write_text("no class")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "set" / "b", target_is_directory=True)

    labels = read_labels(str(tmp_path / "set"))

    folder = ImageFolder(str(tmp_path / "set"))
    assert labels == tuple(folder.classes)
    assert {name: i for i, name in enumerate(labels)} == folder.class_to_idx


def test_labels_of_imagenet_have_a_name() -> None:
    assert read_labels("imagenet") == imagenet_labels()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "the file is empty"),
        ("x.txt", b"\xff\xfec\x00a\x00t\x00", "it is not UTF-8 (byte 0); save it as UTF-8"),
        ("x.txt", "Köter".encode("latin-1"), "it is not UTF-8 (byte 1)"),
        ("x.csv", b"\n\n", "the file is empty"),
        ("x.csv", b"n01440764,tench\nn01443537,goldfish", "no column has the numbers of the classes"),
        ("x.csv", b"0,cat\n1,dog\n1,owl", "class 1 is there twice, as 'dog' and as 'owl'"),
        ("x.csv", b"0,cat\n2,dog", "class 1 is missing: 2 classes are numbered from 0 to 1"),
        ("x.csv", b"1,cat\n2,dog", "class 0 is missing: 2 classes are numbered from 0 to 1"),
        ("x.csv", b"0,cat\n1,dog,brown", "the row '1,dog,brown' has 3 columns, the first 2"),
        ("x.csv", b"0,cat\n1,", "class 1 has no name"),
        ("x.json", b"{", "it is no JSON"),
        ("x.json", b"[" * 100_000, ""),
        ("x.json", b"7", "neither a JSON list of names"),
        ("x.json", b"[]", "neither a JSON list of names"),
        ("x.json", b'{"cat": "0", "dog": "1"}', "neither a JSON list of names"),
        ("x.json", b'["cat", null]', "the label of class 1 is None, not a name"),
        ("x.json", b'["cat", ""]', "the label of class 1 is '', not a name"),
        ("x.json", b'{"1": "cat", "2": "dog"}', "class 0 is missing: 2 classes are numbered from 0 to 1"),
        ("x.json", b'{"cat": 0, "dog": 0}', "class 0 is there twice, as 'cat' and as 'dog'"),
        ("x.json", b'{"0": "cat", "0": "dog"}', "'0' is in it twice"),
        ("x.json", b'{"cat": 0, "dog": -1}', "class"),
    ],
)  # fmt: skip
def test_labels_that_are_none_are_refused_with_the_reason(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(InvalidRequest) as refused:
        read_labels(str(tmp_path / name))

    assert str(refused.value).startswith(f"labels '{tmp_path / name}': ")
    assert message in str(refused.value)


@pytest.mark.parametrize("read", [read_labels, lambda name: read_thresholds(name, None)], ids=["labels", "thresholds"])
def test_what_is_no_file_is_refused(tmp_path: Path, read: Callable[[str], object]) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere.txt", "No such file"), ("empty", "older|directory|regular")):
        with pytest.raises(InvalidRequest, match=message):
            read(str(tmp_path / name))


def test_a_label_of_several_classes_is_named() -> None:
    assert repeated(["a", "b", "a", "b"]) == "classes 0 and 2 are both called 'a'; tell them by class_id"
    assert repeated(["a", "b"]) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.txt", "0.5\n0.25\r\n1\n"),
        ("x.json", "[0.5, 0.25, 1]"),
        ("x.json", '{"owl, barn": 1.0, "cat": 0.5, "großer Hund": 0.25}'),
        ("x.json", '{"2": 1.0, "0": 0.5, "1": 0.25}'),
        ("x.csv", 'label,threshold\ncat,0.5\n"owl, barn",1\ngroßer Hund,0.25'),
        ("x.csv", "0,0.5\n1,0.25\n2,1"),
        ("x.csv", "threshold\n0.5\n0.25\n1"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_thresholds_are_read_in_the_order_of_the_labels(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    assert read_thresholds(write(tmp_path / name, text, encoding), NAMES) == (0.5, 0.25, 1.0)


def test_one_threshold_for_all_is_a_number() -> None:
    assert read_thresholds("0.25", None) == 0.25


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "0.5\nmuch\n", "much"),
        ("x.txt", "", "neither a number"),
        ("x.json", "{}", "neither a number"),
        ("x.json", '"0.5"', "neither a number for each class nor one for each label"),
        ("x.json", "[[0.5]]", "neither a number"),
        ("x.json", '{"cat": 0.5, "dog": 0.5}', "no threshold for 'großer Hund'"),
        ("x.json", '{"cat": 1, "großer Hund": 1, "owl, barn": 1, "dog": 1}', "there is no class 'dog'"),
        ("x.csv", "cat,0.5\ncat,0.6", "'cat' is in it twice"),
    ],
)
def test_thresholds_that_are_none_are_refused_with_the_reason(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_thresholds(write(tmp_path / name, text), NAMES)

    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("problem_type", "classes"),
    [
        (None, 3), ("single_label_classification", 3), ("multi_label_classification", 3), ("regression", 3), (None, 1),
        ("regression", 1),
    ],
)  # fmt: skip
def test_scores_are_those_of_transformers_pipeline(problem_type: str | None, classes: int) -> None:
    torch.manual_seed(0)
    config = PvtV2Config(
        num_labels=classes, problem_type=problem_type, depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 40, 64)
    )
    model = PvtV2ForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)
    processor = PvtImageProcessor(size={"height": 64, "width": 64})
    pipeline = ImageClassificationPipeline(model=model, image_processor=processor)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))

    expected = {each["label"]: each["score"] for each in pipeline(image)}

    with torch.inference_mode():
        logits = model(**processor(image, return_tensors="pt")).logits[0].numpy()
    found = scores(logits, Answers(activation=activation_of(problem_type, classes)))
    assert {f"LABEL_{i}": score for i, score in enumerate(found.tolist())} == pytest.approx(expected, rel=1e-5)
