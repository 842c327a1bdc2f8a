"""The command line as a whole: it lists its commands, and a mistake is one line and a failure."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from typing import Any

import click
import pytest
from click.testing import CliRunner

from regmix import cli
from regmix.errors import StudyError


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["regmix-fast", *words])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make `regmix-fast report` raise."""

    def fail_with(error: BaseException) -> None:
        @click.command()
        def report() -> None:
            raise error

        monkeypatch.setattr(cli._LazyGroup, "get_command", lambda self, context, name: report)

    return fail_with


def test_help_lists_every_command_in_the_order_of_the_pipeline() -> None:
    text = CliRunner().invoke(cli.cli, ["--help"]).output
    places = [text.index(f"\n  {name} ") for name in cli.COMMANDS]
    assert places == sorted(places)


def test_help_answers_without_importing_a_command() -> None:
    program = (
        "import sys; from regmix.cli import cli; cli(['--help'], standalone_mode=False); "
        "sys.exit(any(name.startswith('regmix.cli.') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = CliRunner().invoke(cli.cli, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"regmix-fast {name}" in result.output


def test_the_version_is_the_installed_one() -> None:
    assert version("regmix-fast") in CliRunner().invoke(cli.cli, ["--version"]).output


def test_an_unknown_command_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run_main(monkeypatch, "optimise") == 2
    assert "optimise" in capsys.readouterr().err


def test_an_unknown_option_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run_main(monkeypatch, "pack", "--no-such-option") == 2
    assert "--no-such-option" in capsys.readouterr().err


def test_a_users_error_is_one_line_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, failing: Any, capsys: Any
) -> None:
    failing(StudyError("./study: there is no study", cure="Draw one"))
    assert run_main(monkeypatch, "report") == 1
    assert capsys.readouterr().err == "Error: ./study: there is no study. Draw one.\n"


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, failing: Any) -> None:
    failing(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        run_main(monkeypatch, "report")


def test_ctrl_c_says_how_to_go_on_and_fails(
    monkeypatch: pytest.MonkeyPatch, failing: Any, capsys: Any
) -> None:
    failing(KeyboardInterrupt())
    assert run_main(monkeypatch, "report") == 130
    assert "Run the same command again" in capsys.readouterr().err


def test_success_is_exit_code_zero(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run_main(monkeypatch, "--help") == 0
    assert "regmix-fast demo" in capsys.readouterr().out
