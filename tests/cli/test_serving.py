import httpx


def test_serve_is_the_server_with_options_for_settings(service_url: str) -> None:
    assert not service_url.endswith(":1")  # which PVT_PORT says
    assert httpx.get(f"{service_url}/health").json() == {"live": True, "ready": True, "reasons": []}
