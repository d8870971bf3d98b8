"""The README's commands are the ones that run."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"```sh\n(.*?)\n```", readme, flags=re.DOTALL)
    (test_command,) = [command for command in commands if "pytest" in command]
    assert test_command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_main_job_is_one_command_that_makes_its_environment():
    readme = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"```sh\n(.*train_lm.*)\n```", readme)
    script = command.split()[-2]
    assert (ROOT / script).is_file()
    assert command.startswith("python3 -m venv ")
