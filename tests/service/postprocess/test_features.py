"""Features and explanations against transformers' PVT-v2 with the same weights; what is done to features."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.architecture.variants import VARIANTS
from service.backends.base import Backend
from service.backends.cpu import OpenVinoBackend, TorchBackend
from service.errors import ImageTooLarge, InvalidImage, InvalidRequest
from service.postprocess import Explanation, FeatureOptions, explain, features, numbers
from service.results import ImageResult, InferenceResult, Outputs, Timing, require_all
from tests.service.postprocess.twins import answer, executable_of, make_twin, theirs

TORCH, OPENVINO = TorchBackend(1), OpenVinoBackend(1)
CASES: list[tuple[str, Backend, tuple[int, int]]] = [(variant, TORCH, (64, 64)) for variant in VARIANTS]
CASES += [("pvt_v2_b0", TORCH, (32, 96)), ("pvt_v2_b0", OPENVINO, (64, 96)), ("pvt_v2_b1", OPENVINO, (64, 32))]
NAMES = ("embedding", "stage1", "stage2", "stage3", "stage4")


def stacked(result: InferenceResult, options: FeatureOptions) -> dict[str, NDArray[Any]]:
    """The features of all images, each array with a first axis for the image."""
    images = [features(each.outputs, options) for each in require_all(result.results, [None] * len(result.results))]
    return {name: np.stack([each[name] for each in images]) for name in images[0]}


def name(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return value if isinstance(value, str) else getattr(value, "name", "")


@pytest.mark.parametrize(("variant", "backend", "size"), CASES, ids=name)
def test_features_and_activation_maps_are_those_of_transformers(
    variant: str, backend: Backend, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = make_twin(variant)
    answered = answer(executable_of(twin, variant, backend, size, monkeypatch))
    reference = theirs(twin, answered)

    ours = stacked(answered, FeatureOptions(stages=(1, 2, 3, 4)))
    stages = [each.numpy() for each in reference.hidden_states]
    assert tuple(ours) == NAMES
    for mine, true in zip(ours.values(), (stages[3].mean(axis=(2, 3)), *stages), strict=True):
        assert true.std() > 0.1  # equality of numbers that are all alike would say nothing
        np.testing.assert_allclose(mine, true, atol=1e-3, rtol=1e-4)

    for class_id in (None, 0, 999):
        for explained, logits, stage in zip(
            explain(answered, class_id), reference.logits.numpy(), stages[3], strict=True
        ):
            assert isinstance(explained, Explanation)
            assert explained.class_id == (logits.argmax() if class_id is None else class_id)
            weight = twin.theirs.classifier.weight.detach().numpy()[explained.class_id]
            np.testing.assert_allclose(explained.map, np.einsum("c,chw->hw", weight, stage), atol=1e-3, rtol=1e-4)
            np.testing.assert_allclose(explained.logit, logits[explained.class_id], atol=1e-3)
            assert abs(explained.map.mean(dtype=np.float64) + explained.bias - explained.logit) < 1e-4


def outputs(seed: int = 0) -> Outputs:
    random = np.random.default_rng(seed)
    stages = [
        random.standard_normal((c, 8 // s, 4 // s)).astype(np.float32) for c, s in ((2, 1), (3, 1), (4, 2), (5, 4))
    ]
    return Outputs(np.zeros(3, np.float32), stages[3].mean(axis=(1, 2)), tuple(stages))


def test_pooling_comes_before_normalising() -> None:
    given, wanted = outputs(), FeatureOptions(stages=(2,), pool="avg", normalize=True)
    pooled = given.stages[1].mean(axis=(1, 2))

    np.testing.assert_allclose(features(given, wanted)["stage2"], pooled / np.linalg.norm(pooled), rtol=1e-6)


def test_each_position_of_a_map_is_normalised_by_itself() -> None:
    given = outputs()
    normal = features(given, FeatureOptions(stages=(1,), normalize=True))["stage1"]

    np.testing.assert_allclose(np.linalg.norm(normal, axis=0), 1, rtol=1e-6)
    np.testing.assert_allclose(normal[0] / normal[1], given.stages[0][0] / given.stages[0][1], rtol=1e-5)


def test_a_vector_of_nothing_but_zeros_stays_as_it_is() -> None:
    nothing = Outputs(np.zeros(3, np.float32), np.zeros(5, np.float32))

    assert features(nothing, FeatureOptions(normalize=True))["embedding"].tolist() == [0] * 5


def test_arrays_are_contiguous_whatever_the_backend_gives() -> None:
    given = outputs()
    turned = given._replace(stages=tuple(np.asfortranarray(each) for each in given.stages))

    for wanted in (
        FeatureOptions(stages=(1, 4)),
        FeatureOptions(stages=(1, 4), dtype="float16"),
        FeatureOptions(stages=(1,), normalize=True),
    ):
        assert all(each.flags.c_contiguous and each.dtype == wanted.dtype for each in features(turned, wanted).values())


def answered(*results: Any) -> InferenceResult:
    inferred = [
        ImageResult(1, 1, each, Timing(0, 0, 0, 0), np.zeros((1, 1, 3), np.uint8))
        if isinstance(each, Outputs)
        else each
        for each in results
    ]
    return InferenceResult(None, "1", (32, 32), None, inferred)  # type: ignore[arg-type]  # the card is not looked at


def test_maps_count_even_where_only_their_means_are_answered() -> None:
    given = answered(InvalidImage("no"), outputs())

    assert numbers(given) == 2 * 5
    assert numbers(given, stages=[1]) == 2 * (5 + 64)
    assert numbers(answered(InvalidImage("no"))) == 0


def test_what_fails_the_binary_forms_names_every_image_and_keeps_its_status() -> None:
    failed = [ImageTooLarge("large"), InvalidImage("bad"), InvalidImage("bad"), InvalidImage("bad")]

    with pytest.raises(ImageTooLarge) as caught:
        require_all([1, *failed], ["a.png", "b.png", None, "d.png", "e.png"], ", ask otherwise")
    assert str(caught.value) == (
        "image 2 ('b.png'): large; image 3: bad; image 4 ('d.png'): bad; and 1 more; this form of answer holds "
        "all images or none, ask otherwise"
    )
    with pytest.raises(InvalidImage, match=r"^bad$"):
        require_all(failed[1:2], [None])


def test_nothing_at_all_can_not_be_asked_for() -> None:
    with pytest.raises(InvalidRequest, match="nothing is left to answer with"):
        FeatureOptions(embedding=False)
