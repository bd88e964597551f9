import ast
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench.bodies import bodies
from bench.images import jpegs
from bench.peers import CONTENDERS, OURS, QUICK, chosen
from bench.peers.common import CONFIGS, answers, crop, make_model, prepare
from service.architecture.variants import VARIANTS

ROOT = Path(__file__).parent.parent.parent


def test_every_contender_has_a_name_of_its_own_a_module_and_a_description() -> None:
    names = [contender.name for contender in CONTENDERS]

    assert len(set(names)) == len(names)
    assert names[0] == "ours"
    for contender in CONTENDERS:
        path = ROOT / contender.command[1].replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        assert contender.configured


def test_every_peer_file_starts_something_when_run_and_only_then() -> None:
    for path in (ROOT / "bench" / "peers").glob("*.py"):
        if path.stem not in {"__init__", "common"}:
            guards = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
            assert [ast.unparse(guard.test) for guard in guards] == ["__name__ == '__main__'"], path


def test_ours_is_asked_in_the_same_form_as_litserve() -> None:
    assert {contender.form for contender in chosen(QUICK)} == {OURS.form}


def test_a_command_is_filled_in_with_port_and_store() -> None:
    argv = chosen(("litserve",))[0].argv(8123, "/store")

    assert argv[1:] == ["-m", "bench.peers.litserve_eager", "--port", "8123", "--store", "/store"]


def test_a_peer_that_is_not_installed_says_what_is_missing() -> None:
    contender = CONTENDERS[0].__class__("x", "X", (), "raw", ("torch", "no-such-package"), "")

    assert contender.missing() == ["no-such-package"]


def test_an_unknown_contender_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no contender x; known: .*litserve"):
        chosen(("x",))


def test_the_peers_model_has_the_size_of_each_variant() -> None:
    assert CONFIGS.keys() == VARIANTS.keys()
    assert sum(parameter.numel() for parameter in make_model("pvt_v2_b0").parameters()) == 3_666_760


def test_the_peers_prepare_an_image_as_the_published_checkpoints_want_it() -> None:
    (image,) = jpegs(1)

    assert crop(image).shape == (224, 224, 3)
    assert prepare(image).shape == (3, 224, 224)
    assert prepare(image).mean().abs() < 2


def test_a_portrait_is_prepared_too() -> None:
    buffer = BytesIO()
    Image.new("RGB", (300, 500), "white").save(buffer, "jpeg")

    assert prepare(buffer.getvalue()).shape == (3, 224, 224)


def test_answers_are_the_five_best_classes() -> None:
    (answer,) = answers(torch.arange(10.0)[None])

    assert [each["class_id"] for each in answer["predictions"]] == [9, 8, 7, 6, 5]


def test_an_image_is_sent_raw_or_as_a_form() -> None:
    raw, form = bodies([b"jpeg"], "raw")[0], bodies([b"jpeg"], "multipart")[0]

    assert (raw.content_type, raw.data) == ("image/jpeg", b"jpeg")
    boundary = form.content_type.partition("boundary=")[2].encode()
    assert form.data.startswith(b"--" + boundary + b'\r\nContent-Disposition: form-data; name="image"')
    assert form.data.endswith(b"\r\n\r\njpeg\r\n--" + boundary + b"--\r\n")
