from bench.models import report
from bench.results import Model


def test_the_table_has_medians_with_their_spread() -> None:
    model = Model(
        parameters=3_666_760,
        weights_bytes=14_700_000,
        first_load_seconds=3.21,
        cached_load_seconds=0.204,
        memory_bytes=123_456_789,
        rates=(80.0, 70.0, 90.0),
    )

    assert report({"pvt_v2_b0": model}).splitlines()[2:] == [
        "| `pvt_v2_b0` | 3,666,760 | 15 MB | 3.2 s | 0.20 s | 123 MB | 80 (70 to 90) |"
    ]
