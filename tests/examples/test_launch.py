"""The launch files: parsed, and their commands run here, by what stands for the cluster's own."""

import os
import pathlib
import random
import re
import subprocess
import sys

import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; Orbax brings it")

# `srun` of two tasks on this machine; JAX recognizes it by these variables.
SRUN = """#!/usr/bin/env bash
for i in 0 1; do
  SLURM_JOB_ID={job} SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1 \\
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit $status
"""
# `gcloud` that runs what it is to run on all hosts here, where the repository has another name.
GCLOUD = """#!/usr/bin/env bash
command="${{*: -1}}"
command="${{command#--command=}}"
command="${{command/cd lazy_orbax/cd {root}}}"
echo "on all hosts: $command"
case "$command" in
  *"pip install"*) ;;
  *) eval "$command --processes 2" ;;
esac
"""


@pytest.fixture
def environment(tmp_path):
    """One in which a command may stand for another."""
    commands = tmp_path / "commands"
    commands.mkdir()
    texts = {"srun": SRUN.format(job=random.randrange(4096)), "gcloud": GCLOUD.format(root=ROOT)}
    for name, text in texts.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return {
        **kept,
        "PATH": f"{commands}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }


def run(command, environment, **more):
    done = subprocess.run(
        command,
        env={**environment, **more},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def steps_in(directory):
    with ocp.CheckpointManager(directory) as manager:
        return list(manager.all_steps())


def test_slurm(tmp_path, environment):
    command = ["bash", str(LAUNCH / "slurm.sh")]
    printed = run(command, environment, RUN=str(tmp_path / "run"), STEPS="6", EVERY="3")
    assert "done: steps [3, 6]" in printed
    assert steps_in(tmp_path / "run") == [3, 6]
    text = (LAUNCH / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", text, re.MULTILINE))
    assert options["signal"].startswith("TERM@")
    assert "requeue" in options


@pytest.mark.slow
def test_tpu_vm(tmp_path, environment):
    text = (LAUNCH / "tpu-vm.sh").read_text()
    script = tmp_path / "tpu-vm.sh"
    script.write_text(text.replace("--steps=1000 --save-every=100", "--steps=6 --save-every=3"))
    assert script.read_text() != text
    run_in = str(tmp_path / "run")
    printed = run(["bash", str(script)], environment, TPU="tpu", ZONE="zone", RUN=run_in)
    assert "pip install -q -e '.[examples]'" in printed
    assert steps_in(run_in) == [3, 6]


def test_gke(tmp_path, environment):
    job = yaml.safe_load((LAUNCH / "gke-jobset.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job["spec"]["replicatedJobs"]
    hosts = replicated["template"]["spec"]
    assert hosts["parallelism"] == hosts["completions"] == 2
    pod = hosts["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (container,) = pod["containers"]
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    assert chips * hosts["parallelism"] == rows * columns
    given = {"--directory=gs://BUCKET/runs/1": f"--directory={tmp_path / 'run'}"}
    given |= {"--steps=1000": "--steps=6", "--save-every=100": "--save-every=3"}
    command = [given.pop(word, word) for word in container["command"]]
    assert not given
    run([*command, "--processes=2"], environment)
    assert steps_in(tmp_path / "run") == [3, 6]
