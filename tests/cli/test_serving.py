import httpx

from tests.app.processes import serving


def test_serve_is_the_same_server_with_options_for_settings() -> None:
    with serving(command=("-m", "cli", "serve", "--workers", "2", "--port", "0"), port="1") as server:
        listening = server.seen[-1]

        assert listening["workers"] == 2
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        assert server.stop() == 0
