import re

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "client.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_documentation_s_code_prints_what_it_says(
    block: str, service_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    code = block.replace("http://127.0.0.1:8000", service_url).replace("Client()", f"Client({service_url!r})")

    exec(compile(code, "docs/client.md", "exec"), {})  # noqa: S102  our own

    assert capsys.readouterr().out.splitlines() == re.findall(r"(?:^ *|  )# (.*)", block, re.MULTILINE)
