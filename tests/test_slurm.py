"""The SLURM scripts in a real SLURM of one node, from Debian's packages, that starts and ends with these tests."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

LAUNCH = Path(__file__).parents[1] / "launch"
DAEMONS = [
    shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("munged", "slurmctld", "slurmd")
]

pytestmark = pytest.mark.skipif(
    not all(DAEMONS) or os.geteuid() != 0, reason="needs munge, slurmctld, slurmd, slurm-client and root"
)

CONFIG = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=3
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/linear
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
MpiDefault=none
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Asks a SLURM command."""
    folder = tmp_path_factory.mktemp("slurm")
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0)), b.bind(("127.0.0.1", 0))
        ports = a.getsockname()[1], b.getsockname()[1]
    text = CONFIG.format(host=socket.gethostname().split(".")[0], folder=folder, ports=ports)
    (folder / "slurm.conf").write_text(text)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    files = {
        name: f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")
    }
    munge = [DAEMONS[0], "--foreground", "--force", f"--key-file={key}", *files.values()]
    daemons = [subprocess.Popen(munge, env=environment)]
    runs.until((folder / "munge.socket").exists)
    daemons += [subprocess.Popen([daemon, "-D"], env=environment) for daemon in DAEMONS[1:]]

    def ask(*command: str, **more: str) -> str:
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    try:
        latest = time.monotonic() + 60
        while "idle" not in (said := ask("sinfo", "--noheader", "--format=%t")):
            if time.monotonic() > latest:
                pytest.skip(f"SLURM does not start here: {said}")
            time.sleep(0.1)
        yield ask
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sbatch")))
def test_slurm_would_take_the_script(slurm, script):
    said = slurm("sbatch", "--test-only", "--nodes=1", str(LAUNCH / script), "x.yaml")
    assert "to start at" in said, said


def test_a_job_that_is_preempted_is_queued_again_and_goes_on(slurm, world, tmp_path):
    """The real script and command; the run ends as one that nobody disturbed."""
    changes = {"federation__num_rounds": 500, "evaluate_every": 500, "checkpoint_every": 500}
    config, run, said = (
        runs.write_config(tmp_path / "c.yaml", world, **changes),
        tmp_path / "run",
        tmp_path / "said",
    )
    fslora = shutil.which("fslora") or str(Path(sys.executable).parent / "fslora")
    arguments = [str(LAUNCH / "slurm.sbatch"), str(config), "--run-dir", str(run)]
    options = ["--nodes=1", "--parsable", f"--output={said}", *arguments]
    job = slurm("sbatch", *options, FSLORA=fslora, FSLORA_CACHE=str(world.cache)).strip()

    def state() -> dict[str, str]:
        return dict(
            pair.split("=", 1) for pair in slurm("scontrol", "show", "job", job).split() if "=" in pair
        )

    runs.until(lambda: (run / "metrics.jsonl").exists() and len(runs.records(run)) > 5)
    slurm("scancel", "--signal=TERM", job)
    runs.until(lambda: (state()["Restarts"], state()["JobState"]) == ("1", "PENDING"))
    saved = [path.name for path in (run / "checkpoints").iterdir()]
    assert len(saved) == 1 and 5 < int(saved[0]) < 500
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    runs.until(lambda: state()["JobState"] == "COMPLETED")
    assert [record["round"] for record in runs.records(run)] == list(range(501))
    assert f"stopped after round {saved[0]} of 500, which is saved" in " ".join(said.read_text().split())
