import json

import pytest

from tests.cli.conftest import PvtServe


@pytest.mark.usefixtures("engine_here")
def test_the_models_of_the_store_are_listed_without_loading_one(pvt_serve: PvtServe) -> None:
    done = pvt_serve("models")

    assert "pvt_v2_b0.digits (default)" in done.out
    assert "available" in done.out
    assert done.code == 0


def test_as_json_they_are_what_the_service_tells(pvt_serve: PvtServe, service_url: str) -> None:
    model, *_ = json.loads(pvt_serve("models", "--json", "--url", service_url).out)["models"]

    assert (model["id"], model["num_classes"]) == ("pvt_v2_b0.digits", 10)
