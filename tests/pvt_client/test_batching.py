"""Several images in a request: grouped, split where the service refuses them together, and in order."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from tqdm import tqdm

from pvt_client import (
    AsyncClient,
    Client,
    ConnectionLost,
    Features,
    ImageUnreadable,
    InvalidImage,
    InvalidRequest,
    ModelChanged,
    Prediction,
    Retries,
    ServiceFailed,
    TimedOut,
)  # fmt: skip
from pvt_client.batching import RequestSize, Waiting
from pvt_client.exchange import server_timing
from tests.pvt_client.conftest import CallMethod
from tests.pvt_client.scripted import (
    BAD,
    Behaviour,
    FakeTime,
    Received,
    cut,
    predicted,
    refused,
    response,
    scripted,
    sized,
)  # fmt: skip

IMAGES = [b"x" * (1 + number) for number in range(100)]


def refusing(unless: Any, refusal: Behaviour, answer: Any = sized) -> Behaviour:
    """Refuses each request but those whose images `unless` is true of."""

    def behaviour(connection: Any, received: Received) -> None:
        if unless(received.images):
            answer(connection, received)
        elif callable(refusal):
            refusal(connection, received)
        else:
            connection.sendall(refusal)

    return behaviour


def vectors(connection: Any, received: Received, version: str = "1") -> None:
    """Embeddings (length of the image, 1), as the service sends them; one bad image fails them all."""
    if BAD in received.images:
        connection.sendall(refused(422, "invalid-image" if len(received.images) == 1 else "invalid-request"))
    else:
        array = np.array([[len(data), 1] for data in received.images], np.float32)
        body = save({"embedding": array}, {"model": "m", "version": version})
        connection.sendall(response(200, body, "application/vnd.safetensors", X_Request_ID=f"r{len(received.images)}"))


def widths(found: list[tuple[bytes, Any]]) -> list[Any]:
    return [result.width if isinstance(result, Prediction) else type(result) for _, result in found]


def counts(requests: list[Received]) -> list[int]:
    return [len(each.images) for each in requests]


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_quick_answers_make_requests_larger_and_keep_the_order(call: CallMethod, concurrency: int) -> None:
    with scripted(sized) as server:
        found = call(server.url, "predict_many", IMAGES, concurrency=concurrency)

    assert [image for image, _ in found] == IMAGES
    assert widths(found) == [len(each) for each in IMAGES]
    assert counts(server.requests)[0] == 1
    assert max(counts(server.requests)) <= 16
    assert len(server.requests) < 70
    assert sorted(data for each in server.requests for data in each.images) == IMAGES


def test_no_request_has_more_images_than_it_may(call: CallMethod) -> None:
    for most in (1, 5):
        with scripted(sized) as server:
            call(server.url, "predict_many", IMAGES, client={"images_per_request": most})
        assert max(counts(server.requests)) <= most
    with pytest.raises(ValueError, match="images_per_request is 0; it is 1 or more"):
        call("localhost:1", "predict_many", IMAGES, client={"images_per_request": 0})


def test_slow_answers_make_requests_smaller(call: CallMethod) -> None:
    with scripted(sized) as server:
        found = call(server.url, "predict_many", IMAGES[:20], concurrency=1, time=FakeTime(tick=0.6))

    assert widths(found) == [len(each) for each in IMAGES[:20]]
    assert counts(server.requests) == [1] * 20


@pytest.mark.parametrize(
    "error",
    [refused(422, "too-many-images"), refused(413, "body-too-large"), response(413, b"<html>nginx</html>", "text/html"),
     refused(429, "queue-full"), refused(500, "internal-error"), cut],
    ids=["too many", "too large", "too large for a proxy", "queue full", "failed", "cut"],
)  # fmt: skip
def test_what_is_refused_together_is_sent_in_halves(call: CallMethod, error: Behaviour) -> None:
    """Each of these a service, or a proxy in front of it, may answer to so many images and not to fewer."""
    with scripted(refusing(lambda images: len(images) <= 3, error)) as server:
        found = call(server.url, "predict_many", IMAGES, client={"retries": Retries(attempts=1)})

    assert widths(found) == [len(each) for each in IMAGES]


@pytest.mark.parametrize("kind", ["too-many-images", "body-too-large"])
def test_a_limit_is_met_only_a_few_times(call: CallMethod, kind: str) -> None:
    error = refused(422 if kind == "too-many-images" else 413, kind)
    images = [b"x" * 100] * 300
    with scripted(refusing(lambda images: len(images) <= 4, error)) as server:
        found = call(server.url, "predict_many", images, concurrency=1)

    assert len(found) == 300
    assert sum(count > 4 for count in counts(server.requests)) <= 2


@pytest.mark.parametrize("place", [0, 1, 7, 50, 98, 99])
def test_a_bad_image_is_its_own_error_and_costs_others_nothing(call: CallMethod, place: int, tmp_path: Path) -> None:
    images: list[Any] = [*IMAGES]
    images[place], images[place - 1] = BAD, tmp_path / "none.png"
    with scripted(sized) as server:
        found = call(server.url, "predict_many", images)

    expected: list[Any] = [len(each) for each in IMAGES]
    expected[place], expected[place - 1] = InvalidImage, ImageUnreadable
    assert widths(found) == expected


def test_a_bad_image_that_fails_its_whole_request_costs_others_nothing(call: CallMethod) -> None:
    """The binary form of features has no place for an error."""
    images = [*IMAGES[:40], BAD, *IMAGES[40:], BAD]
    with scripted(vectors) as server:
        found = call(server.url, "features_many", images, concurrency=1)

    lengths = [result.embedding[0] if isinstance(result, Features) else type(result) for _, result in found]
    assert lengths == [InvalidImage if each == BAD else len(each) for each in images]


@pytest.mark.parametrize("error", [refused(500, "internal-error"), cut], ids=["500", "cut"])
def test_an_image_that_breaks_the_service_costs_others_nothing(call: CallMethod, error: Behaviour) -> None:
    with scripted(refusing(lambda images: IMAGES[60] not in images, error)) as server:
        found = call(server.url, "predict_many", IMAGES)

    kind = ConnectionLost if error is cut else ServiceFailed
    assert widths(found) == [kind if each == IMAGES[60] else len(each) for each in IMAGES]


def test_images_that_time_out_together_are_not_sent_again(call: CallMethod) -> None:
    with scripted(refusing(lambda images: len(images) < 4, refused(504, "deadline-exceeded"))) as server:
        found = call(server.url, "predict_many", IMAGES, concurrency=1)

    assert {TimedOut} < {TimedOut if isinstance(result, TimedOut) else type(result) for _, result in found}
    assert sum(counts(server.requests)) == len(IMAGES)


def test_a_wrong_parameter_is_raised(call: CallMethod) -> None:
    with scripted(refused(422, "invalid-request")) as server, pytest.raises(InvalidRequest):
        call(server.url, "predict", IMAGES[:64])

    assert len(server.requests) == 1


def test_each_request_is_tried_again_after_the_seconds_it_names(call: CallMethod) -> None:
    refusals: list[Behaviour] = [sized, refused(503, "model-loading", Retry_After="2"), sized]
    refusals += [refused(429, Retry_After="1"), sized]
    time = FakeTime()
    with scripted(*refusals) as server:
        found = call(server.url, "predict_many", IMAGES, concurrency=1, time=time)

    assert widths(found) == [len(each) for each in IMAGES]
    assert time.slept == [2.05, 1.05]


def test_large_images_travel_alone(call: CallMethod) -> None:
    large = b"x" * 3_000_000
    with scripted(sized) as server:
        found = call(server.url, "predict_many", [*IMAGES[:30], large, large, *IMAGES[:30]], concurrency=1)

    assert len(found) == 62
    assert max(len(each.body) for each in server.requests) < 4_100_000


def test_a_list_beyond_the_service_s_limit_is_split(call: CallMethod) -> None:
    with scripted(refusing(lambda images: len(images) <= 10, refused(422, "too-many-images"))) as server:
        predictions = call(server.url, "predict", [*IMAGES, BAD])
        within = call(server.url, "predict", IMAGES[:8])

    assert [each.width for each in predictions[:-1]] == [len(each) for each in IMAGES]
    assert isinstance(predictions[-1], InvalidImage)
    assert [each.height for each in within] == [8] * 8


def test_features_of_a_long_list_are_stacked(call: CallMethod) -> None:
    with scripted(vectors) as server:
        features = call(server.url, "features", IMAGES)

    assert features.embedding.tolist() == [[len(each), 1] for each in IMAGES]
    assert counts(server.requests) == [64, 36]
    assert features.request_id is None


def test_a_list_of_no_image_is_no_request(call: CallMethod) -> None:
    with scripted(vectors) as server:
        assert call(server.url, "predict", []) == []
        assert call(server.url, "predict_many", []) == []
        assert call(server.url, "embed", []).shape == (0, 0)
        with pytest.raises(ImageUnreadable, match="an empty list"):
            call(server.url, "features", [])

    assert server.requests == []


def test_arrays_of_four_axes_are_as_many_images(call: CallMethod) -> None:
    import torch  # noqa: PLC0415  slow to import

    array = np.random.default_rng(0).integers(0, 256, (5, 8, 9, 3), np.uint8)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    with scripted(sized) as server:
        listed = call(server.url, "predict", [*array])
        for batch in (array, tensor, array[:, :, :, :1]):
            assert len(call(server.url, "predict", batch)) == 5
            assert len(call(server.url, "predict_many", batch)) == 5
        assert call(server.url, "predict", array) == call(server.url, "predict", tensor) == listed
        assert call(server.url, "predict", array[:0]) == []


def test_embeddings_are_the_rows_of_an_array(call: CallMethod) -> None:
    with scripted(vectors) as server:
        table = call(server.url, "embed", IMAGES, normalize=True, model="m@1")

    assert (table.dtype, table.shape) == (np.float32, (100, 2))
    assert table.tolist() == [[len(each), 1] for each in IMAGES]
    assert {(each.query["normalize"], each.query["model"]) for each in server.requests} == {("true", "m@1")}


def test_a_bad_image_s_embedding_is_raised_or_a_row_of_nan(call: CallMethod) -> None:
    with scripted(vectors) as server:
        with pytest.raises(InvalidImage) as caught:
            call(server.url, "embed", [b"a", b"b", BAD, b"d"])
        table = call(server.url, "embed", [b"a", BAD, b"ccc"], errors="return")
        with pytest.raises(InvalidImage):
            call(server.url, "embed", [BAD, BAD], errors="return")

    assert caught.value.__notes__ == ["It is of image 3: bytes"]
    assert table[[0, 2]].tolist() == [[1, 1], [3, 1]]
    assert np.isnan(table[1]).all()


@pytest.mark.parametrize("method", ["embed", "features"])
def test_vectors_of_two_versions_are_not_stacked(call: CallMethod, method: str) -> None:
    def behaviour(connection: Any, received: Received) -> None:
        vectors(connection, received, version="1" if IMAGES[0] in received.images else "2")

    with scripted(behaviour) as server, pytest.raises(ModelChanged, match=r"m@1 and m@2, .* model='m@2'"):
        call(server.url, method, IMAGES)


@pytest.mark.parametrize("method", ["predict", "predict_many"])
def test_an_error_of_an_image_is_raised_where_that_is_wanted(call: CallMethod, tmp_path: Path, method: str) -> None:
    missing = tmp_path / "none.png"
    with scripted(sized) as server:
        with pytest.raises(ImageUnreadable) as caught:
            call(server.url, method, [b"a", missing], errors="raise")
        with pytest.raises(ValueError, match="errors is 'ignore'; it is 'return' or 'raise'"):
            call(server.url, method, [b"a"], errors="ignore")

    assert caught.value.__notes__ == [f"It is of image 2: {missing}"]


def test_progress_is_reported_of_each_image(call: CallMethod) -> None:
    with scripted(vectors) as server, tqdm(total=100, file=StringIO()) as bar:
        call(server.url, "embed", IMAGES, progress=bar.update)

        assert bar.n == 100


def test_images_are_read_only_when_their_request_is_made(tmp_path: Path) -> None:
    """A generator of paths whose files exist for a moment only, and which waits for the results before."""

    def paths() -> Iterator[Path]:
        for number in range(200):
            (path := tmp_path / f"{number}.png").write_bytes(b"x" * (number + 1))
            yield path

    with scripted(sized) as server, Client(server.url) as client:
        for number, (path, result) in enumerate(client.predict_many(paths(), concurrency=2), 1):
            assert isinstance(result, Prediction)
            assert result.width == number
            path.unlink()
            assert len([*tmp_path.iterdir()]) <= 2 * 2 * (16 + 1)


def test_an_asynchronous_source_is_taken_too() -> None:
    async def images() -> AsyncIterator[bytes]:
        for each in IMAGES:
            await asyncio.sleep(0)
            yield each

    async def run(url: str) -> list[Any]:
        async with AsyncClient(url) as client:
            return [each async for each in client.predict_many(images())]

    with scripted(sized) as server:
        assert widths(asyncio.run(run(server.url))) == [len(each) for each in IMAGES]


def test_an_error_of_the_source_is_raised_and_ends_all(call: CallMethod) -> None:
    def images() -> Iterator[bytes]:
        yield from IMAGES[:20]
        raise KeyError("the source")

    with scripted(sized) as server, pytest.raises(KeyError, match="the source"):
        call(server.url, "predict_many", images())


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("photos", r"str is one image and several are expected: pass a list; of a folder sorted"),
        (Path("photos"), r"sorted\(Path\(folder\).iterdir\(\)\)"),
        (b"bytes", "bytes is one image"),
        (np.zeros((8, 8, 3), np.uint8), "ndarray is one image"),
        (np.zeros((8, 8), np.uint8), "ndarray is one image"),
        (7, "int holds no images"),
        (None, "NoneType holds no images"),
    ],
)  # fmt: skip
def test_one_image_in_place_of_several_is_refused_by_name(call: CallMethod, images: Any, words: str) -> None:
    with pytest.raises(ImageUnreadable, match=words):
        call("localhost:1", "predict_many", images)


def test_results_have_the_request_s_id_and_its_times(call: CallMethod) -> None:
    result = {"filename": None, "width": 1, "height": 1}
    bodies: dict[str, Any] = {
        "predict": {"predictions": []},
        "embedding": {"embedding": [1, 2]},
        "explain_map": {"class_id": 0, "label": "0", "score": 1, "logit": 1, "bias": 0, "map": [[1]]},
    }
    headers = {"Server_Timing": "decode;dur=0.68, queue;dur=1, cdn;desc=hit, infer;dur=1.79", "X_Request_ID": "r1"}
    for method, fields in bodies.items():
        body = json.dumps({"model": "m", "version": "1", "results": [result | fields]}).encode()
        with scripted(response(200, body, **headers)) as server:
            answer = call(server.url, method, b"a")
        assert (answer.request_id, answer.timing_ms) == ("r1", {"decode": 0.68, "queue": 1.0, "infer": 1.79})

    with scripted(predicted()) as server:
        answer = call(server.url, "predict", b"a")
    assert (answer.request_id, answer.timing_ms) == (None, {})


@pytest.mark.parametrize(
    ("header", "times"),
    [
        ("", {}),
        ("total;dur=1.5", {"total": 1.5}),
        ('a;desc="x";dur=2 , b ; DUR="3"', {"a": 2, "b": 3}),
        ("a;dur=1, a;dur=2", {"a": 1}),
        ("a;dur=none, ;;, =, dur=3", {}),
    ],
)  # fmt: skip
def test_server_timing_is_read_as_the_standard_says(header: str, times: dict[str, float]) -> None:
    assert server_timing(header) == times


def test_threads_that_take_images_share_them() -> None:
    size = RequestSize(16)
    size.images = 16
    waiting = Waiting[int, None](size, 4)
    for number in range(1000):
        waiting.append(number, None)
    taken: list[list[int]] = []

    def take() -> None:
        while places := waiting.take():
            taken.append([each.image for each in places])

    threads = [threading.Thread(target=take) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert sorted(number for each in taken for number in each) == list(range(1000))
    assert max(map(len, taken)) == 16
