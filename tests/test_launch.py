"""Launch scripts: sound shell, and the very commands that they give, taken down by stand-ins on the PATH."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import runs
import yaml

from fslora_jax.preemption import EXIT_CODE
from fslora_jax.processes import LOST_CODE

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") id=${JAX_PROCESS_ID:-} of=${JAX_NUM_PROCESSES:-} at=${JAX_COORDINATOR_ADDRESS:-} $*" >> "$CALLS"
case "$(basename "$0") ${JAX_PROCESS_ID:-}" in $FAILS) exit "$CODE";; esac
"""
RUN = ("configs/x.yaml", "--run-dir", "/runs/a b")


@pytest.fixture
def call(tmp_path):
    """Runs a script where every command that it needs only writes down how it was called."""
    for name in ("fslora", "srun", "scontrol", "gcloud", "xpk"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)

    def run(script: str, *argv: str, fails: str = "", code: int = 0, **environment: str):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        path = f"{tmp_path}:{os.environ['PATH']}"
        own = {
            "PATH": path,
            "CALLS": str(calls),
            "FSLORA": str(tmp_path / "fslora"),
            "FAILS": fails or "-",
            "CODE": str(code),
        }
        done = subprocess.run(
            [LAUNCH / script, *argv],
            env=os.environ | own | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stderr

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_is_sound(script):
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = [checker, "--shell=bash", script] if checker else ["bash", "-n", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.access(script, os.X_OK)


def test_several_processes_know_each_other(call):
    code, calls, _ = call("several.sh", "3", *RUN, PORT="5000")
    assert code == 0
    assert sorted(calls) == [
        f"fslora id={n} of=3 at=127.0.0.1:5000 train configs/x.yaml --run-dir /runs/a b --distributed"
        for n in range(3)
    ]
    for failed in (2, LOST_CODE):
        code, calls, err = call("several.sh", "3", *RUN, fails="fslora 1", code=failed)
        assert code == failed
        assert ("the same command goes on from the last checkpoint" in err) == (
            failed != 2
        )  # not after a mistake
    for count in ("0", "two"):
        code, calls, err = call("several.sh", count, *RUN)
        assert (code, calls) == (2, [])
        assert f"N: found '{count}', expected a number of processes" in err
    assert "usage" in call("several.sh")[2]


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_several_processes_that_are_asked_to_stop_have_saved_when_the_script_ends(tmp_path, asked):
    stand_in = tmp_path / "fslora"
    stand_in.write_text(
        "#!/usr/bin/env bash\n"
        f"trap 'sleep 1; touch \"{tmp_path}/saved $JAX_PROCESS_ID\"; exit 143' TERM\n"
        f'touch "{tmp_path}/here $JAX_PROCESS_ID"\n'
        "while :; do sleep 0.1; done\n"
    )
    stand_in.chmod(0o755)
    # A shell cannot trap what is ignored where it starts, as Ctrl-C is by tests in the background.
    command = ["env", "--default-signal=INT", LAUNCH / "several.sh", "2", *RUN]
    process = subprocess.Popen(command, env=os.environ | {"FSLORA": str(stand_in)}, start_new_session=True)
    try:
        runs.until(lambda: len(list(tmp_path.glob("here *"))) == 2)
        process.send_signal(asked)
        assert process.wait(timeout=60) == EXIT_CODE
        assert len(list(tmp_path.glob("saved *"))) == 2
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        *((code, 0, False) for code in (0, 1, 2)),
        *((EXIT_CODE, restarts, True) for restarts in (0, 10)),
        *((LOST_CODE, restarts, restarts < 10) for restarts in (0, 9, 10)),
        (128 + signal.SIGKILL, 0, True),
    ],
)
def test_slurm_queues_a_run_again_that_was_stopped_or_lost_a_process(call, code, restarts, again):
    """And no other; one that loses processes again and again is given up."""
    environment = {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": str(restarts)}
    found, calls, _ = call("slurm.sbatch", *RUN, fails="srun ", code=code, **environment)
    assert (found, calls[1:]) == (code, ["scontrol id= of= at= requeue 42"] * again)
    assert calls[0].endswith("fslora train configs/x.yaml --run-dir /runs/a b --distributed")


def test_a_study_is_an_array(call):
    environment = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_JOB_ID": "7"}
    code, calls, _ = call("slurm_study.sbatch", "s.yaml", "--out", "/runs/s", **environment)
    assert code == 0
    assert calls[0].endswith("fslora study s.yaml --out /runs/s --part 3 8")
    code, calls, _ = call("slurm_study.sbatch", "s.yaml", fails="srun ", code=143, **environment)
    assert calls[1].endswith("requeue 7_3")


def test_every_worker_of_a_slice_runs_the_same_command(call):
    _, (called,), _ = call("tpu_pod.sh", *RUN, TPU="pod", ZONE="z")
    assert called.endswith(
        "compute tpus tpu-vm ssh pod --zone z --worker all --command cd ~/fslora_jax && "
        r".venv/bin/fslora train configs/x.yaml --run-dir /runs/a\ b --distributed"
    )
    _, (called,), _ = call("xpk.sh", "first", *RUN, CLUSTER="c", TPU_TYPE="v5litepod-16", IMAGE="i")
    assert called.endswith(
        "--workload first --command " r"fslora train configs/x.yaml --run-dir /runs/a\ b --distributed"
    )
    for script, missing in (("tpu_pod.sh", "TPU"), ("xpk.sh", "CLUSTER")):
        code, calls, said = call(script, *RUN)
        assert (code != 0, calls) == (True, [])
        assert f"set {missing}" in said


def test_the_job_of_the_set_is_one_that_kubernetes_knows():
    """By Kubernetes' own schema, which has no JobSet, but the Job that it makes."""
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **job}
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)
    pod = whole["spec"]["template"]["spec"]
    pod["terminationGrace"] = pod.pop("terminationGracePeriodSeconds")
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGrace"):
        kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)


def test_manifests_name_hosts_once_and_commands_that_exist():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert (jobset["kind"], job["parallelism"], job["backoffLimit"]) == ("JobSet", job["completions"], 0)
    (mistake,), (policy,) = job["podFailurePolicy"]["rules"], jobset["spec"]["failurePolicy"]["rules"]
    assert (mistake["action"], mistake["onExitCodes"]["containerName"]) == ("FailJob", container["name"])
    assert (policy["action"], policy["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert not {EXIT_CODE, LOST_CODE} & set(mistake["onExitCodes"]["values"])
    assert container["command"][0] == "fslora"
    assert (LAUNCH.parent / container["command"][2]).is_file()
    mounted, volumes = container["volumeMounts"][0]["name"], job["template"]["spec"]["volumes"]
    assert [volume["name"] for volume in volumes] == [mounted]
    sky = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert sky["num_nodes"] == 2
    assert sky["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_CODE]
    done = subprocess.run(["bash", "-n", "-c", sky["run"]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert list(sky["file_mounts"]) == ["/runs"]
