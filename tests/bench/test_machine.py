from bench.machine import machine, versions

ZEN5 = """\
processor\t: 0
cpu family\t: 26
model\t\t: 2
model name\t: A Processor
flags\t\t: fpu avx2 avx512f avx512_bf16 sse

processor\t: 1
model name\t: Another
"""


def test_the_processor_is_told_with_what_matters_of_its_flags() -> None:
    facts = machine(ZEN5)

    assert facts["processor"] == "A Processor (family 26, model 2)"
    assert (facts["instructions"], facts["bfloat16"]) == ("avx2 avx512f avx512_bf16", "native")


def test_a_processor_that_tells_little_is_no_error() -> None:
    facts = machine("")

    assert facts["bfloat16"] == "not native"
    assert facts["instructions"] == "none of note"


def test_versions_are_of_what_is_installed() -> None:
    assert "openvino" in versions()
