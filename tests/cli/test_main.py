import re
import subprocess
import sys
import tomllib
from importlib.metadata import version

import pytest
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from cli.main import create_app, main
from tests.conftest import ROOT


def pvt_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, to its end."""
    command = [sys.executable, "-m", "cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_installed_command_is_this_one() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

    assert scripts == {"pvt-serve": f"{main.__module__}:{main.__name__}"}


def test_the_version_is_the_package_s() -> None:
    assert CliRunner().invoke(create_app(), ["--version"]).output == f"pvt-serve {version('pvt-serve')}\n"


@pytest.mark.parametrize("arguments", [["serve", "--port", "70000"], ["serve", "--workers", "0"]])
def test_a_setting_out_of_bounds_is_one_line_and_a_usage_error(arguments: list[str]) -> None:
    done = pvt_serve(*arguments)

    assert done.returncode == 2
    assert done.stderr.startswith(f"pvt-serve: PVT_{arguments[1][2:].upper()}={arguments[2]}: ")
    assert done.stderr.count("\n") == 1


def test_no_help_has_words_that_its_markdown_takes_for_html_and_leaves_out() -> None:
    command = get_command(create_app())
    assert isinstance(command, TyperGroup)
    texts = [
        (name, text)
        for name, each in command.commands.items()
        for text in (each.help, *(getattr(parameter, "help", None) for parameter in each.params))
    ]

    assert len({name for name, _ in texts}) > 10
    assert not [each for each in texts if each[1] and re.search("<[a-z]", re.sub("`[^`]*`", "", each[1]))]


def test_the_help_does_not_wait_for_torch() -> None:
    code = "import sys; from cli.main import create_app; create_app(); assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True)


def test_the_shell_completes_commands() -> None:
    variables = {"_PVT_SERVE_COMPLETE": "complete_bash", "COMP_WORDS": "pvt-serve em", "COMP_CWORD": "1"}

    done = CliRunner().invoke(create_app(), [], prog_name="pvt-serve", env=variables)

    assert done.output.split() == ["embed"]
