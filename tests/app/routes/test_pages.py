import re

from starlette.testclient import TestClient


def test_the_first_page_says_what_this_is_and_links_to_the_docs(client: TestClient) -> None:
    response = client.get("/")

    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "Pyramid Vision Transformer v2" in response.text
    assert all(client.get(f"/{link}").status_code == 200 for link in re.findall('<a href="(.*?)"', response.text))


def test_the_docs_load_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs").text

    addresses = re.findall(r'(?:src|href)="(.*?)"', page)
    assert len(addresses) >= 3
    assert all(client.get(address).status_code == 200 for address in addresses if address.startswith("/"))
    assert not [address for address in addresses if not address.startswith("/")]


def test_the_schema_describes_all_three_forms_of_a_body(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/predict"]["post"]

    content = operation["requestBody"]["content"]
    assert set(content) == {
        "multipart/form-data",
        "image/png",
        "image/jpeg",
        "application/octet-stream",
        "application/json",
    }
    assert {"200", "404", "413", "415", "422", "429", "503", "504"} <= set(operation["responses"])
