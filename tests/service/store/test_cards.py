"""Cards of this release, of older ones and of newer ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.errors import CardInvalid
from service.images.geometry import Geometry
from service.store.cards import FORMAT, Answers, Preprocessing, card_json, read_card
from service.store.store import Store
from tests.service.remotes import TINY, add_small

OLDER = {"height": 224, "width": 224, "crop": 0.9, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25] * 3}


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads((folder / "card.json").read_text())
    change(content)
    (folder / "card.json").write_text(json.dumps(content))
    return folder


def of_older_release(folder: Path, **pixels: Any) -> Path:
    def change(content: dict[str, Any]) -> None:
        content.pop("format", None)
        content["preprocessing"] = OLDER | pixels

    return rewritten(folder, change)


def test_an_older_card_goes_on_meaning_what_it_meant_and_says_so_once(tmp_path: Path) -> None:
    folder = of_older_release(add_small(tmp_path))

    with capture_logs() as logs:
        cards = [read_card(folder) for _ in range(3)]

    assert {card.preprocessing.geometry for card in cards} == {
        Geometry(224, 224, 0.9, "bicubic", "shorter_side_crop", "nearest")
    }
    assert cards[0].preprocessing.geometry.resized(224) == 249
    (line,) = [line for line in logs if line["event"] == "card_of_older_format"]
    assert "249" in line["what"]
    assert "248" in line["hint"]


@pytest.mark.parametrize("pixels", [{"crop": 1.0}, {"crop": 0.875}], ids=str)
def test_an_older_card_that_means_the_same_today_says_nothing(tmp_path: Path, pixels: dict[str, Any]) -> None:
    with capture_logs() as logs:
        read_card(of_older_release(add_small(tmp_path), **pixels))

    assert not logs


def test_what_is_written_now_says_its_format_and_how_it_rounds(tmp_path: Path) -> None:
    card = read_card(add_small(tmp_path))
    pixels = card.preprocessing.model_copy(update={"crop": 0.9})

    content = json.loads(card_json(card.model_copy(update={"preprocessing": pixels})))

    assert content["format"] == 2
    assert content["preprocessing"].items() >= {"resize": "shorter_side_crop", "crop": 0.9, "rounding": "floor"}.items()


def test_a_card_that_an_older_release_would_read_rightly_is_written_so_that_it_can(tmp_path: Path) -> None:
    content = json.loads((add_small(tmp_path) / "card.json").read_text())

    assert "format" not in content
    assert content["preprocessing"].keys() == OLDER.keys()
    assert read_card(tmp_path / TINY / "1").preprocessing.rounding == "floor"


@pytest.mark.parametrize(
    "fields",
    [
        {"activation": "sigmoid"},
        {"activation": "none", "unknown_below": -7.0},
        {"temperature": 1.7},
        {"thresholds": 0.25},
        {"thresholds": (0.5, 0.25, 1.0)},
        {"unknown_below": 0.6},
        {"labels": ()},
    ],
    ids=str,
)
def test_a_card_that_an_older_release_would_misread_is_of_a_format_that_it_refuses(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    folder = add_small(tmp_path)
    card = read_card(folder).model_copy(update=fields)

    (folder / "card.json").write_text(card_json(card))

    content = json.loads((folder / "card.json").read_text())
    assert content["format"] == 3
    assert content.keys() & Answers.model_fields.keys() == fields.keys() - {"labels"}
    assert read_card(folder) == card


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "relu"}, "activation: Input should be 'softmax', 'sigmoid' or 'none'"),
        ({"temperature": 0}, "temperature: Input should be greater than or equal to 0.001"),
        ({"temperature": float("nan")}, "temperature"),
        ({"activation": "none", "temperature": 2}, "so there is no temperature"),
        ({"thresholds": 1.5}, "thresholds 1.5: scores of a softmax are from 0 to 1"),
        ({"thresholds": [0.5, 0.5]}, "2 thresholds for 3 classes; give one for each"),
        ({"activation": "sigmoid", "thresholds": [0.5, 0.5, -1]}, "thresholds -1: scores of a sigmoid"),
        ({"unknown_below": -0.1}, "unknown_below -0.1"),
        ({"labels": [], "activation": "sigmoid"}, "a model without a head has no activation"),
        ({"labels": [], "thresholds": [0.5]}, "a model without a head has no thresholds"),
    ],
    ids=str,
)
def test_answers_that_can_not_be_meant_fail_with_their_field(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = rewritten(add_small(tmp_path), lambda content: content.update(fields))

    with pytest.raises(CardInvalid, match=r"card\.json") as failed:
        read_card(folder)

    assert message in str(failed.value)


def test_a_size_to_explain_at_is_nothing_that_older_releases_would_misread(tmp_path: Path) -> None:
    folder = add_small(tmp_path)
    card = read_card(folder).model_copy(update={"explain_size": (128, 96)})
    (folder / "card.json").write_text(card_json(card))

    assert read_card(folder) == card
    assert "format" not in json.loads((folder / "card.json").read_text())


@pytest.mark.parametrize("size", [[100, 128], [0, 128], [128, 8192], [128], 128, "128"], ids=str)
def test_a_size_to_explain_at_that_no_model_takes_is_refused_by_name(tmp_path: Path, size: object) -> None:
    folder = rewritten(add_small(tmp_path), lambda content: content.update(explain_size=size))

    with pytest.raises(CardInvalid, match="explain_size"):
        read_card(folder)


def test_fields_of_a_newer_release_are_ignored_with_a_warning(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["colour"] = "red"
        content["preprocessing"]["gamma"] = True
        content["weights"]["shards"] = []
        content["accuracy"] = {"dataset": "mine", "top1": 0.5, "images": 9, "top5": 0.9}

    before = read_card(add_small(tmp_path))
    folder = rewritten(tmp_path / TINY / "1", change)
    with capture_logs() as logs:
        cards = [read_card(folder) for _ in range(3)]

    assert cards[0].preprocessing == before.preprocessing
    assert cards[0].accuracy
    assert [(line["event"], line["log_level"]) for line in logs] == [("card_fields_ignored", "warning")]
    assert logs[0]["what"] == "accuracy.top5, colour, preprocessing.gamma, weights.shards"


def test_a_model_of_one_class_is_warned_of(tmp_path: Path) -> None:
    with capture_logs() as logs:
        read_card(add_small(tmp_path, classes=1))

    assert [line["event"] for line in logs] == ["card_of_one_class"]


def test_a_card_of_a_newer_format_fails_its_version_alone(tmp_path: Path) -> None:
    add_small(tmp_path)
    rewritten(add_small(tmp_path, version="2"), lambda content: content.update(format=FORMAT + 1, new="field"))

    newest, first = Store(tmp_path).versions(TINY)

    assert isinstance(newest.failure, CardInvalid)
    assert f"format {FORMAT + 1}" in str(newest.failure)
    assert "newer release" in str(newest.failure)
    assert Store(tmp_path).find(TINY) == first


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ({"resize": "letterbox", "crop": 1.0}, "a letterbox needs fill"),
        ({"resize": "tile"}, "preprocessing.resize: Input should be 'shorter_side_crop', 'stretch'"),
        ({"resize": "stretch", "crop": 0.9}, "a stretch has no crop"),
        ({"rounding": "up"}, "preprocessing.rounding"),
        ({"mean": [123.675, 116.28, 103.53]}, "divide those of 0..255 by 255"),
        ({"std": [58.395, 57.12, 57.375]}, "divide those of 0..255 by 255"),
        ({"mean": [-0.1, 0, 0]}, "preprocessing.mean.0"),
        ({"std": [0, 1, 1]}, "preprocessing.std.0: Input should be greater than 0"),
        ({"std": [float("nan"), 1, 1]}, "preprocessing.std.0"),
        ({"crop": 1.5}, "preprocessing.crop"),
    ],
    ids=str,
)
@pytest.mark.parametrize("older", [True, False])
def test_preprocessing_that_can_not_be_meant_fails_with_its_field(
    tmp_path: Path, pixels: dict[str, Any], message: str, older: bool
) -> None:
    folder = add_small(tmp_path)
    if older:
        of_older_release(folder)
    rewritten(folder, lambda content: content["preprocessing"].update(pixels))

    with pytest.raises(CardInvalid, match=r"card\.json") as failed:
        read_card(folder)

    assert message in str(failed.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"card"', "1", "\xff", '{"format": "x"}', '{"format": 0}', '{"format": null}',
             '{"preprocessing": 7}', "[" * 100_000, "9" * 10_000]
)  # fmt: skip
def test_what_is_no_card_fails_with_the_files_name(tmp_path: Path, text: str) -> None:
    folder = add_small(tmp_path)
    (folder / "card.json").write_bytes(text.encode("latin-1"))

    with pytest.raises(CardInvalid, match=r"card\.json"):
        read_card(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"resize": "letterbox", "fill": (114, 114, 114)},
        {"resize": "center_crop"},
        {"resize": "none"},
        {"interpolation": "area"},
        {"antialias": False},
        {"kernel": "opencv", "antialias": False},
        {"colours": "bgr"},
    ],
    ids=str,
)
def test_what_only_format_3_can_say_is_written_in_it_and_refused_in_an_earlier_one(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    card = read_card(folder := add_small(tmp_path))
    pixels = Preprocessing.model_validate(card.preprocessing.model_dump() | changes)
    (folder / "card.json").write_text(text := card_json(card.model_copy(update={"preprocessing": pixels})))

    assert json.loads(text)["format"] == 3
    assert read_card(folder).preprocessing == pixels
    for earlier in (1, 2):
        (folder / "card.json").write_text(json.dumps(json.loads(text) | {"format": earlier}))
        with pytest.raises(CardInvalid, match=r'cards before format 3 have no such meaning; write "format": 3'):
            read_card(folder)
