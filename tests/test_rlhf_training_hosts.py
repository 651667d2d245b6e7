"""Several machines: two addresses of the loopback interface, each with an SSH server of the test's own."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from conftest import PROMPTS, ROOT, TINY

from benchmarks.faults.killed_process import link_stages
from rlhf.errors import UserError
from rlhf.runs.artifacts import MANIFEST
from rlhf.training import hosts

FIRST, SECOND = "127.0.0.1", "127.0.0.2"
LOST = f"error: host {SECOND} ({{}}): the connection to it was lost; the other hosts are stopped\n"
WITHIN = 300.0  # seconds of any wait, on a busy machine


# ---- the file


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a slots=2\nb slots=2\na slots=2\n", "hosts:3: a stands in line 1 already"),
        ("a slots=2\n\n# b\nb slot=2\n", "hosts:4: 'b slot=2' is no host: write `HOST slots=N`"),
        ("a slots=0\n", "hosts:1: 'a slots=0' is no host"),
        ("-oProxyCommand=x slots=1\n", "is no host"),
        ("a\n", "hosts:1: 'a' is no host"),
        ("# nobody\n", "HOSTFILE=hosts names no host"),
        (None, "HOSTFILE=hosts cannot be read (No such file or directory)"),
    ],
)
def test_a_host_file_that_cannot_be_used_is_one_line(text, line, inside):
    if text is not None:
        Path("hosts").write_text(text)
    with pytest.raises(UserError) as caught:
        hosts.read_hosts("hosts")
    assert line in str(caught.value)


def test_a_host_file_may_have_comments_and_unequal_slots(inside):
    Path("hosts").write_text("# two\nb slots=1  # the small one\n\na   slots=12\n")
    assert hosts.read_hosts("hosts") == [hosts.Host("b", 1), hosts.Host("a", 12)]


# ---- two of them


def free_on_both():
    """A port that is free on both addresses."""
    with socket.socket() as one, socket.socket() as two:
        try:
            one.bind((FIRST, 0))
            two.bind((SECOND, one.getsockname()[1]))
        except OSError as error:
            pytest.skip(f"{SECOND} is no address of this machine: {error}")
        return one.getsockname()[1]


class Machines:
    """Two hosts, and the launcher that starts something on them; ``lost`` has its folder at another place."""

    def __init__(self, keys, folder):
        self.folder, self.keys, self.port = folder, keys, free_on_both()
        self.servers = {}
        options = (
            f"-F /dev/null -p {self.port} -i {keys}/client -o IdentitiesOnly=yes -o LogLevel=ERROR "
            "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        )
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PROCS", "PORT")}
        self.environment |= {
            "PYTHONPATH": str(ROOT), "HOSTFILE": "hosts", "SSH": f"ssh {options}",
        }  # fmt: skip

    def serve(self, address, *replaced):
        server = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "ssh_server.py", address, str(self.port),
             self.keys / "host", self.keys / "client", *map(str, replaced)],
            stdout=subprocess.PIPE, text=True, cwd="/", env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        self.servers[address] = psutil.Process(server.pid)
        assert server.stdout.readline() == "listening\n"

    def start(self, slots, module, *arguments):
        """The launcher; what all processes print goes to ``log``."""
        lines = [f"{address} slots={n}\n" for address, n in slots.items()]
        (self.folder / "hosts").write_text("".join(lines))
        self.log = self.folder / "log"
        command = [sys.executable, "-m", "rlhf.training.launch", module, *map(str, arguments)]
        with self.log.open("w") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def run(self, *arguments):
        """Start and wait; the exit status and what was printed."""
        status = self.start(*arguments).wait(WITHIN)
        return status, self.log.read_text()

    def kill(self, address):
        """A host and all that runs on it."""
        server = self.servers.pop(address)
        for process in [server, *server.children(recursive=True)]:
            process.kill()
        server.wait()


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A key of the hosts and one of the user."""
    asyncssh = pytest.importorskip("asyncssh", reason="the hosts of this test need asyncssh: make setup")
    if shutil.which("ssh") is None:
        pytest.skip("no ssh on this machine")
    folder = tmp_path_factory.mktemp("keys")
    for name in ("host", "client"):
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(folder / name)
        key.write_public_key(folder / f"{name}.pub")
        (folder / name).chmod(0o600)
    return folder


@pytest.fixture
def machines(keys, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    found = Machines(keys, here)
    yield found
    for address in [*found.servers]:
        found.kill(address)


PROBE = """
import json, os, pathlib, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "OMP_NUM_THREADS")
found = {name: os.environ.get(name) for name in names}
pathlib.Path(f"rank-{found['RANK']}").write_text(json.dumps([found, sys.argv[1:]]))
"""


def test_ranks_count_through_hosts_of_unequal_slots(machines):
    machines.serve(FIRST)
    machines.serve(SECOND)
    (machines.folder / "probe.py").write_text(PROBE)
    machines.environment["OMP_NUM_THREADS"] = "7"
    words = ["recipe.yaml", 'name=it\'s a $HOME "b"']
    status, said = machines.run({SECOND: 1, FIRST: 2}, "probe", *words)
    assert status == 0, said
    ranks = [json.loads((machines.folder / f"rank-{rank}").read_text()) for rank in range(3)]
    assert {found["WORLD_SIZE"] for found, _ in ranks} == {"3"}
    assert {found["MASTER_ADDR"] for found, _ in ranks} == {SECOND}, "the first of the file"
    assert len({found["MASTER_PORT"] for found, _ in ranks}) == 1
    assert [found["CROSS_RANK"] for found, _ in ranks] == ["0", "1", "1"]
    assert ranks[0][0]["LOCAL_RANK"] == "0"
    assert {ranks[1][0]["LOCAL_RANK"], ranks[2][0]["LOCAL_RANK"]} == {"0", "1"}
    assert all(given[1:] == words and found["OMP_NUM_THREADS"] == "7" for found, given in ranks)
    assert [*(machines.folder / "runs").iterdir()] == [], "the check leaves nothing behind"


def test_what_is_wrong_with_the_hosts_is_one_line_before_anything_starts(machines, tmp_path):
    (machines.folder / "probe.py").write_text(PROBE)
    machines.serve(FIRST)
    status, said = machines.run({FIRST: 1, SECOND: 1}, "probe")
    assert status == 2
    assert re.fullmatch(
        r"error: hosts: 127\.0\.0\.2 cannot be reached by ssh \(.*Connection refused\): try "
        r"`ssh 127\.0\.0\.2 true`; mend it, or take the host out of the file\n",
        said,
    )
    elsewhere = tmp_path / "elsewhere"
    machines.serve(SECOND, machines.folder, elsewhere)
    status, said = machines.run({FIRST: 1, SECOND: 1}, "probe")
    assert status == 2
    assert said.startswith(f"error: hosts: {SECOND} cannot run {sys.executable} in {machines.folder} (bash:")
    assert said.count("\n") == 1
    elsewhere.mkdir()
    status, said = machines.run({FIRST: 1, SECOND: 1}, "probe")
    assert status == 2
    assert said == (
        f"error: hosts: {SECOND} does not see what this machine writes into {machines.folder}/runs: put the "
        "project on storage that all hosts share; mend it, or take the host out of the file\n"
    )
    assert not [*machines.folder.glob("rank-*"), *elsewhere.iterdir()]
    machines.environment["PROCS"] = "2"
    status, said = machines.run({FIRST: 1}, "probe")
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith("error: PROCS: the slots of HOSTFILE say how many processes start")


def test_hosts_that_are_not_alike_are_one_line(machines, tmp_path):
    """The second one has a GPU and another torch, by stand-ins for its interpreter and for nvidia-smi."""
    stub, smi = tmp_path / "python", tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: one'\n")
    older = (
        "import importlib.metadata as m, runpy; real = m.version; "
        "m.version = lambda name: '1.0' if name == 'torch' else real(name); "
        "runpy.run_module('rlhf.training.node', run_name='__main__')"
    )
    stub.write_text(
        f'#!/bin/sh\nunset CUDA_VISIBLE_DEVICES\nPATH={tmp_path}:$PATH exec {sys.executable} -c "{older}"\n'
    )
    for file in (stub, smi):
        file.chmod(0o755)
    machines.serve(FIRST)
    machines.serve(SECOND, sys.executable, stub)
    few = "visible GPUs: at most one process a GPU; "
    end = "mend it, or take the host out of the file\n"
    status, said = machines.run({FIRST: 1, SECOND: 2}, "probe")
    first = f"error: hosts: {FIRST} has slots=1 and 0 {few}"
    assert (status, said) == (2, f"{first}{SECOND} has slots=2 and 1 {few}{end}")
    status, said = machines.run({FIRST: 1, SECOND: 1}, "probe")
    unlike = f"{SECOND} has torch 1.0 and not {version('torch')}, as {FIRST} has; "
    assert (status, said) == (2, f"{first}{unlike}{end}")


def test_a_command_that_is_not_there_is_one_line(inside):
    Path("hosts").write_text("a slots=1\n")
    with pytest.raises(UserError, match="SSH: nossh cannot be started"):
        hosts.Hosts("hosts", {"SSH": "nossh -p 3"}).check()
    assert [*Path("runs").iterdir()] == []


WAITING = """
import os, pathlib, signal, sys, time
rank = os.environ["RANK"]
def stop(*_):
    pathlib.Path(f"saved-{rank}").touch(); sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(f"ready-{rank}").touch()
time.sleep(100)
"""


@pytest.fixture
def waiting(machines):
    """A launcher whose processes wait on both hosts."""
    machines.serve(FIRST)
    machines.serve(SECOND)
    (machines.folder / "waiting.py").write_text(WAITING)
    launcher = machines.start({FIRST: 1, SECOND: 2}, "waiting")
    wait_for(lambda: len([*machines.folder.glob("ready-*")]) == 3, launcher)
    return launcher


def wait_for(due, launcher):
    deadline = time.monotonic() + WITHIN
    while not due():
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stop_reaches_the_processes_of_all_hosts(waiting, machines):
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(WITHIN) == 143
    assert sorted(p.name for p in machines.folder.glob("saved-*")) == ["saved-0", "saved-1", "saved-2"]
    assert "error" not in machines.log.read_text()


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process_on_any_host(waiting, machines):
    waiting.kill()
    deadline = time.monotonic() + WITHIN
    while len([*machines.folder.glob("saved-*")]) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_host_that_is_lost_is_named_and_stops_the_others(waiting, machines):
    machines.kill(SECOND)
    assert waiting.wait(WITHIN) == 2
    assert (
        f"error: host {SECOND} (ranks 1 to 2): the connection to it was lost; the other hosts are stopped\n"
        in (machines.log.read_text())
    )
    assert [p.name for p in machines.folder.glob("saved-*")] == ["saved-0"]


STUBBORN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(f"ready-{os.environ['RANK']}").touch()
while len([*pathlib.Path().glob("ready-*")]) < 2: time.sleep(0.05)
if os.environ["RANK"] == "0": sys.exit(2)
time.sleep(100)
"""


@pytest.mark.slow
def test_a_host_that_hangs_is_named_and_its_processes_are_killed(machines, monkeypatch, capfd):
    machines.serve(FIRST)
    machines.serve(SECOND)
    (machines.folder / "stubborn.py").write_text(STUBBORN)
    (machines.folder / "hosts").write_text(f"{FIRST} slots=1\n{SECOND} slots=1\n")
    monkeypatch.chdir(machines.folder)
    monkeypatch.setattr(hosts, "STOP_SECONDS", 0.5)
    began = time.monotonic()
    assert hosts.Hosts("hosts", machines.environment).run(None, "stubborn", []) == 2
    assert time.monotonic() - began < 90
    assert capfd.readouterr().err.endswith(
        f"error: host {FIRST} (rank 0): it ended with status 2; {SECOND} (rank 1) may hang; the other hosts "
        "are stopped\n"
    )
    children = machines.servers[SECOND].children(recursive=True)
    assert not [child for child in children if child.status() != psutil.STATUS_ZOMBIE]


# ---- a stage on them


@pytest.mark.slow
def test_a_stage_survives_the_death_of_a_host(machines, road):
    """Killed behind its first checkpoint, named in time, and the same command goes on and finishes."""
    link_stages(road, machines.folder, "reward")
    machines.serve(FIRST)
    machines.serve(SECOND)
    stage = (
        {FIRST: 1, SECOND: 1}, "reward.training", TINY, *PROMPTS, "reward.batch_size=8", "reward.epochs=6",
        "reward.checkpoint_every=1", "distributed.timeout_minutes=0.5",
    )  # fmt: skip
    done = machines.folder / "runs" / "tiny" / "reward"
    launcher = machines.start(*stage)
    wait_for(lambda: [*done.glob("checkpoints/step-*")], launcher)
    began = time.monotonic()
    machines.kill(SECOND)
    assert launcher.wait(WITHIN) == 2
    assert time.monotonic() - began < 45
    said = machines.log.read_text()
    assert (
        f"error: host {SECOND} (rank 1): the connection to it was lost; the other hosts are stopped\n" in said
    )
    assert "another process of this run ended or hangs" in said, "rank 0 was waiting for it"
    assert "Traceback" not in said
    assert not (done / MANIFEST).exists(), "the kill came too late"
    machines.serve(SECOND)
    status, said = machines.run(*stage)
    assert status == 0, said[-3000:]
    assert "going on after step" in said
    assert (done / MANIFEST).is_file()
