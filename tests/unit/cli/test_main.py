"""The command line: exit statuses, JSON, what it imports, and names that would act."""

from __future__ import annotations

import builtins
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from equipment.runs import EVIL

import lazy_orbax
from lazy_orbax.cli.main import COMMANDS, main

ROOT = pathlib.Path(__file__).parents[3]
# Those that need no more than a path, and change nothing.
READING = ("ls", "show", "verify", "du", "clean")


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize("run", ["stock", "v1", "lazy", "torn", "evil"])
def test_reading_commands_write_json(runs, run, command, capsys):
    status = main([command, str(runs / run), "--json"])
    out = capsys.readouterr().out
    assert status == (command == "verify" and run == "torn")
    assert json.loads(out)
    assert out.isascii()


@pytest.mark.parametrize("command", READING)
def test_names_do_nothing_to_a_terminal(runs, command, capsys):
    assert main([command, str(runs / "evil")]) == 0
    out = capsys.readouterr().out
    assert EVIL not in out
    assert all(line.isprintable() for line in out.splitlines())


@pytest.mark.parametrize("command", READING)
def test_on_a_terminal_there_are_colours_and_names_still_do_nothing(
    runs, command, capsys, monkeypatch
):
    monkeypatch.setenv("TERM", "xterm-256color")
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert main([command, str(runs / "evil")]) == 0
    out, err = capsys.readouterr()
    own = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert all(line.isprintable() for line in own.splitlines())
    assert EVIL.strip() not in out
    if command == "show":  # Folded in a narrow terminal.
        assert r"\x1b[31m[red]<script>" in "".join(own.split())
        assert "\x1b[1m" in out
    assert ("GB/s" in err) == (command == "verify")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["verify", "corrupt"], 1),
        (["ls", "hostile"], 1),
        (["diff", "lazy/1", "lazy/1"], 0),
        (["diff", "lazy/1", "lazy/2", "--json"], 1),
        (["diff", "lazy", "hostile/2"], 1),
        (["show", "hostile/2"], 1),
        (["verify", "hostile"], 1),
        (["du", "hostile"], 0),
        (["clean", "hostile"], 0),
        (["ls", "nothing"], 2),
        (["ls"], 2),
        (["no-such-command"], 2),
        (["show", "lazy", "--sort", "colour"], 2),
        (["--help"], 0),
    ],
)
def test_the_exit_status_says_what_was_found(runs, arguments, status, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert captured.out or captured.err


@pytest.mark.parametrize("is_json", [False, True])
def test_commands_that_write_files(runs, is_json, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = ["--json"] if is_json else []
    assert main(["html", str(runs / "evil"), "-o", "page.html", *more]) == 0
    assert (tmp_path / "page.html").read_text().endswith("</html>\n")
    assert main(["html", str(runs / "evil"), *more]) == 0
    assert main(["bench", ".", "--mebibytes", "16", *more]) == 0
    assert main(["timeline", ".", *more]) == 2
    assert "timeline_file" in capsys.readouterr().err
    line = {"kind": "save", "at_s": 9.0, "directory": "run/1/x", "bytes_written": 7, "step": 1}
    (tmp_path / "run.timeline.jsonl").write_text(json.dumps({**line, "durable_s": 2.0}) + "\n")
    files = ["--trace", "trace.json", "--png", "picture.png"]
    assert main(["timeline", "run", *files, *more]) == 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert (json.loads(out)["entries"][0]["step"] == 1) if is_json else ("step 1" in out)


def test_merge_makes_a_step_of_steps(runs, tmp_path, capsys):
    sources = [str(runs / "lazy" / step) for step in ("1", "2")]
    arguments = ["merge", str(tmp_path / "9"), *sources, "--coefficients", "0.5,0.5"]
    assert main(arguments) == 1
    assert "layer.bias" in capsys.readouterr().err
    assert main([*arguments, "--others", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["coefficients"] == [0.5, 0.5]
    assert main(["verify", str(tmp_path / "9")]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"lazy-orbax {command} " in capsys.readouterr().out


def test_an_error_of_the_storage_has_a_status_of_its_own(runs, monkeypatch, capsys):
    from lazy_orbax.inspection import ls

    def refuse(*_):
        raise PermissionError("no \x1b[31m")

    monkeypatch.setattr(ls, "look", refuse)
    assert main(["ls", str(runs / "lazy")]) == 3
    assert capsys.readouterr().err == "no \\x1b[31m\n"


def test_without_its_packages_the_command_says_what_to_install(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **keywords):
        if name == "rich":
            raise ImportError(name)
        return real(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["ls", "."]) == 2
    assert "pip install click rich" in capsys.readouterr().err


def test_without_a_command_there_is_help_in_lines(capsys):
    assert main([]) == 2
    assert "  ls        List the steps of a run.\n" in capsys.readouterr().err


def run(*arguments, **keywords):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
        check=False,
        **keywords,
    )


@pytest.mark.parametrize("command", READING)
def test_reading_commands_import_no_jax(runs, command):
    script = (
        "import sys; from lazy_orbax.cli.main import main\n"
        f"status = main([{command!r}, sys.argv[1]])\n"
        "found = {'jax', 'orbax'} & set(sys.modules)\n"
        "raise SystemExit(f'imported {found}' if found else status)"
    )
    done = run("-c", script, runs / "lazy", stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert str(runs / "lazy") in done.stdout


def test_a_reader_that_has_seen_enough_and_a_terminal_without_characters(runs):
    arguments = ("-m", "lazy_orbax", "show", runs / "lazy", "*kernel")
    whole = run(*arguments, stdout=subprocess.PIPE)
    assert (whole.returncode, whole.stderr) == (0, "")
    assert "\\u250c" in whole.stdout
    reader, writer = os.pipe()
    os.close(reader)
    closed = run(*arguments, stdout=writer)
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_the_console_script_is_this():
    with (ROOT / "pyproject.toml").open("rb") as file:
        (script,) = tomllib.load(file)["project"]["scripts"].items()
    assert script == ("lazy-orbax", f"{main.__module__}:{main.__name__}")


@pytest.mark.parametrize("verb", lazy_orbax.inspect.__all__)
def test_each_command_is_a_function_of_the_same_name(verb):
    assert verb in COMMANDS
    assert callable(getattr(lazy_orbax.inspect, verb))
