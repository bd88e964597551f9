import httpx

from tests.app.processes import serving


def test_serve_is_the_same_server_with_options_for_settings() -> None:
    with serving(command=("-m", "cli", "serve", "--port", "0"), port="1", backend="torch") as server:
        assert server.url != "http://127.0.0.1:1"
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        assert server.stop() == 0
