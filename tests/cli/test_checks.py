import pytest

from cli.checks import check_size, class_of_label, sides
from cli.terminal import CommandError
from service.acquisition.catalogue import imagenet_labels

LABELS = imagenet_labels()


def test_every_class_of_imagenet_is_found_by_its_whole_label_unless_two_share_it() -> None:
    for number, label in enumerate(LABELS):
        same = [each for each, other in enumerate(LABELS) if other.casefold() == label.casefold()]
        if len(same) == 1:
            assert class_of_label(label, LABELS, "m") == number
        else:
            with pytest.raises(CommandError, match=", ".join(rf"{each} \(" for each in same).replace(", ", ".*")):
                class_of_label(label, LABELS, "m")


@pytest.mark.parametrize("text", ["golden retriever", "Golden Retriever", "  golden retriever "])
def test_a_class_is_found_whatever_the_case_and_blanks(text: str) -> None:
    assert class_of_label(text, LABELS, "m") == 207  # as torchvision's list of categories has it


def test_one_of_the_names_of_a_class_is_enough() -> None:
    assert class_of_label("hound", ["cat", "dog, hound", "fox"], "m") == 1


@pytest.mark.parametrize(("text", "nearest"), [("golden retreiver", "golden retriever"), ("tench fish", "tench")])
def test_the_nearest_labels_are_named(text: str, nearest: str) -> None:
    with pytest.raises(
        CommandError, match=f"no class of m is called so; the nearest are .*{nearest}.*--labels"
    ) as error:
        class_of_label(text, LABELS, "m")

    assert error.value.exit_code == 2


@pytest.mark.parametrize(("size", "expected"), [("224", (224, 224)), ("256x384", (256, 384))])
def test_sizes_are_read(size: str, expected: tuple[int, int]) -> None:
    assert sides(size) == expected
    check_size(size)


@pytest.mark.parametrize("size", ["", "x", "0", "-32", "33", "224x", "224x0", "32 x 32", "٣٢", "224.0", "1056"])
def test_sizes_that_no_model_has_are_refused(size: str) -> None:
    with pytest.raises(CommandError, match="--size") as error:
        check_size(size, most=1024)

    assert error.value.exit_code == 2
