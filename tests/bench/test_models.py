from bench.models import Row, report


def test_the_table_has_medians_with_their_spread() -> None:
    row = Row(3_666_760, 14_700_000, 3.21, 0.204, 123_456_789, [80.0, 70.0, 90.0])

    assert report({"pvt_v2_b0": row}).splitlines()[2:] == [
        "| `pvt_v2_b0` | 3,666,760 | 15 MB | 3.2 s | 0.20 s | 123 MB | 80 (70 to 90) |"
    ]
