import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import COMMANDS, command_named, create_app, main
from tests.cli.conftest import PvtServe
from tests.cli.terminals import command, on_terminal
from tests.conftest import ROOT

COLOUR = r"\x1b\[[0-9;]*[1-9][0-9;]*m"
NAMES = [(name, module) for commands in COMMANDS.values() for name, module, _ in commands]
# Runs each command in one process, and says after each what that has imported of what takes long, and its exit code.
IMPORTED = """
import json, sys
from cli.main import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        heavy = [name for name in ("torch", "openvino", "numpy", "fastapi", "PIL", "httpx") if name in sys.modules]
        print(json.dumps([heavy, len(sys.modules), end.code]), file=sys.stderr)
"""


def pvt_serve_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, to its end."""
    return subprocess.run(command(arguments), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def imported(*commands: Sequence[str], **environment: str) -> list[tuple[set[str], int, int]]:
    """What is imported after each of `commands`, how many modules there are then, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, json.dumps(commands)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]
    assert len(found) == len(commands), done.stderr
    return [({*heavy}, modules, code) for heavy, modules, code in found]


def test_the_installed_command_is_this_one() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

    assert scripts == {"pvt-serve": f"{main.__module__}:{main.__name__}"}


def test_the_version_is_the_package_s() -> None:
    assert CliRunner().invoke(create_app(), ["--version"]).output == f"pvt-serve {version('pvt-serve')}\n"


@pytest.mark.parametrize("arguments", [["serve", "--port", "70000"], ["serve", "--workers", "0"]])
def test_a_setting_out_of_bounds_is_one_line_and_a_usage_error(arguments: list[str]) -> None:
    done = pvt_serve_process(*arguments)

    assert done.returncode == 2
    assert done.stderr.startswith(f"pvt-serve: PVT_{arguments[1][2:].upper()}={arguments[2]}: ")
    assert done.stderr.count("\n") == 1


def test_no_help_has_words_that_its_markdown_takes_for_html_and_leaves_out() -> None:
    texts = [
        (name, text)
        for name, _ in NAMES
        for each in [command_named(name)]
        for text in (each.help, *(getattr(parameter, "help", None) for parameter in each.params))
    ]

    assert len({name for name, _ in texts}) > 10
    assert not [each for each in texts if each[1] and re.search("<[a-z]", re.sub("`[^`]*`", "", each[1]))]


def test_the_summary_of_a_command_is_the_first_line_of_its_help() -> None:
    for commands in COMMANDS.values():
        for name, module, summary in commands:
            function = getattr(import_module(f"cli.{module}"), "import_" if name == "import" else name)
            assert (inspect.getdoc(function) or "").partition("\n")[0] == summary


def test_help_and_wrong_commands_import_little() -> None:
    found = imported(["--help"], ["-h"], ["--version"], ["nonsense"], ["predict", "-h"], ["predict", "--topk", "3"])

    assert [heavy for heavy, *_ in found] == [set()] * 6
    assert [code for *_, code in found] == [0, 0, 0, 2, 0, 2]
    assert (
        max(modules for _, modules, _ in found) < 600
    )  # Python's own, typer's and rich's; with the service it is 3,000


def test_what_is_wrong_is_refused_before_torch_is_imported() -> None:
    one = "docs/digits/one.png"
    wrong = [
        ["predict", "nowhere.png"],
        ["predict", one, "--model", "nothing"],
        ["predict", one, "--size", "33"],
        ["predict", one, "--size", "2048"],
        ["predict", one, "--json", "--csv"],
        ["predict", one, "--min-score", "2"],
        ["predict"],
        ["embed", "docs/digits", "-o", "x.txt"],
        ["explain", one, "--class", "eleven"],
        ["explain", one, "--class", "10"],
        ["explain", "docs"],
        ["show", "nothing"],
        ["rm", "nothing"],
        ["pull", "b9"],
        ["import", "nowhere.pth", "--tag", "x"],
        ["import", "README.md", "--tag", "x", "--size", "big"],
        ["check", "nothing", "docs"],
        ["fit", "nowhere"],
        ["fit", "docs", "--model", "nothing"],
    ]
    for arguments, (heavy, _, code) in zip(wrong, imported(*wrong), strict=True):
        assert (arguments, heavy & {"torch", "openvino", "fastapi"}, code) == (arguments, set(), 2)


def test_every_command_has_its_short_and_quiet_and_verbose_options(pvt_serve: PvtServe) -> None:
    for name, _ in NAMES:
        done = pvt_serve(name, "-h")
        assert (name, done.code, done.err) == (name, 0, "")
        assert all(option in done.out for option in ("--help", "-q", "-v", "--quiet", "--verbose")), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "x.png", "--topk", "3"], "No such option: --topk (Possible options: --top-k)"),
        (["predict", "x.png", "-k", "many"], "Invalid value for '--top-k' / '-k'"),
        (["show"], "Missing argument 'MODEL'"),
        (["predit"], "No such command 'predit'. Did you mean 'predict'"),
        (["ls", "-q", "-v"], "-q and -v exclude each other"),
        (["ls", "--store", "x", "--url", "y"], "give one of them"),
    ],
)
def test_a_wrong_use_is_one_line_that_names_what_is_right(
    pvt_serve: PvtServe, arguments: list[str], message: str
) -> None:
    done = pvt_serve(*arguments)

    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("pvt-serve: ")
    assert message in done.err


def test_the_variables_of_before_are_named(pvt_serve: PvtServe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVTSERVE_URL", "http://localhost:8000")
    done = pvt_serve("ls")

    assert (done.code, done.err) == (2, "pvt-serve: PVTSERVE_URL is not read any more: it is PVT_URL or PVT_KEY now\n")


def test_every_variable_of_an_option_has_the_one_prefix() -> None:
    variables = {parameter.envvar for name, _ in NAMES for parameter in command_named(name).params if parameter.envvar}

    assert variables == {"PVT_URL", "PVT_KEY"}


def test_the_end_of_a_pipe_ends_a_command_quietly() -> None:
    script = 'set -o pipefail; "$@" show pvt_v2_b0.digits --labels | head -n 1 >/dev/null; "$@" -h | true'
    done = subprocess.run(
        ["bash", "-c", script, "_", *command([])], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.stderr == ""


def test_what_an_encoding_does_not_have_is_escaped() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        command(["predict", "schön.jpg"]), cwd=ROOT, capture_output=True, env=environment, check=False
    )

    assert done.stderr == b"pvt-serve: sch\\xf6n.jpg: no such file\n"


def test_ctrl_c_ends_a_command_with_130() -> None:
    with subprocess.Popen(
        command(["predict", "-"]), cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until_reading(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr
        assert "Traceback" not in process.stderr.read()


def wait_until_reading(process: subprocess.Popen[str]) -> None:
    """Until it reads its standard input, as the kernel tells."""
    syscall = Path(f"/proc/{process.pid}/syscall")
    while not syscall.read_text().startswith(("0 0x0 ", "63 0x0 ")):  # read, on x86-64 and on ARM
        assert process.poll() is None


def test_a_spinner_shows_on_a_terminal_that_can_and_nowhere_else() -> None:
    arguments = ("load", "x", "--url", "localhost:1")
    with (
        on_terminal(*arguments) as able,
        on_terminal(*arguments, TERM="dumb") as dumb,
        on_terminal(*arguments, NO_COLOR="1") as colourless,
        on_terminal(*arguments, "-q") as quiet,
    ):
        assert [each.ended() for each in (able, dumb, colourless, quiet)] == [1] * 4

    assert "load x" in able.seen
    assert re.search(COLOUR, able.seen)
    assert "load x" in colourless.seen
    assert not re.search(COLOUR, colourless.seen)
    assert ("\x1b" in dumb.seen, "load x" in dumb.seen, "load x" in quiet.seen) == (False, False, False)


COMPLETIONS: Mapping[str, Mapping[str, str]] = {
    "bash": {"COMP_WORDS": "pvt-serve {}", "COMP_CWORD": "{n}"},
    "zsh": {"_TYPER_COMPLETE_ARGS": "pvt-serve {}"},
    "fish": {"_TYPER_COMPLETE_ARGS": "pvt-serve {}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


@pytest.mark.parametrize("shell", COMPLETIONS)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("em", {"embed"}),
        ("predict --mod", {"--model"}),
        ("predict --model pvt_v2_b0", {"pvt_v2_b0", "pvt_v2_b0.digits"}),
        ("show pvt_v2_b0.digits@", {"pvt_v2_b0.digits@1"}),
        ("pull b2", {"b2", "b2_li"}),
    ],
)
def test_the_shell_completes_commands_options_and_models(shell: str, words: str, expected: set[str]) -> None:
    variables = {"_PVT_SERVE_COMPLETE": f"complete_{shell}"} | {
        name: value.format(words, n=len(words.split())) for name, value in COMPLETIONS[shell].items()
    }

    done = CliRunner().invoke(create_app(), [], prog_name="pvt-serve", env=variables)

    assert [each for each in expected if not re.search(rf"(?<![\w-]){re.escape(each)}(?![\w-])", done.output)] == []


def test_completion_imports_no_torch_and_forgives_wrong_settings() -> None:
    variables = {"_PVT_SERVE_COMPLETE": "complete_bash", "COMP_WORDS": "pvt-serve show pvt", "COMP_CWORD": "2"}
    (heavy, _, code), *_ = imported([], **variables)
    wrong, *_ = imported([], **variables, PVT_PORT="x", PVT_MODEL_STORE="/nowhere")

    assert (heavy & {"torch", "openvino", "fastapi", "numpy"}, code, wrong[2]) == (set(), 0, 0)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_itself_completes_a_model(tmp_path: Path) -> None:
    (tmp_path / "pvt-serve").write_text(f'#!/bin/sh\nexec {sys.executable} -m cli "$@"\n')
    (tmp_path / "pvt-serve").chmod(0o755)
    script = """
source <(_PVT_SERVE_COMPLETE=source_bash pvt-serve)
COMP_WORDS=(pvt-serve predict --model pvt_v2_b0.d) COMP_CWORD=3
_pvt_serve_completion pvt-serve
echo "${COMPREPLY[@]}"
"""
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True, check=True)

    assert done.stdout == "pvt_v2_b0.digits\n"
