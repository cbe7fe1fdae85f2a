"""A real cluster on one machine: a login host and nodes, each with namespaces of its own, ssh and Slurm between them.

A host is a process that holds network, mount, process, host name and IPC namespaces; killing it is a power cut. The
bridge that joins hosts lies in the login host's network, the files of daemons in one folder below /run: nothing of the
machine itself is changed, and `down` leaves nothing behind. All hosts see the machine's files; what lies below
`Cluster.disk` is each host's own.

It needs root and Debian's packages of `PACKAGES`; `missing()` says what is not there.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.processes import alive, until

PACKAGES = {
    "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "munged": "munge", "sshd": "openssh-server",
    "ssh": "openssh-client", "pdsh": "pdsh", "ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux",
}  # fmt: skip
LOGIN = "login"
ROOT = Path("/run/bigtune-cluster")
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
UP_SECONDS = 60.0
CREATED = "created"
"""Lists folders of the machine that were needed to mount something on, and were not there."""

SLURM_CONF = """
ClusterName=bigtune
SlurmctldHost=login({login})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/slurmctld
SlurmdSpoolDir={folder}/%n/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=30
KillWait=20
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs={cores}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
SSHD_CONFIG = """
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/ssh/id.pub
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
Subsystem sftp internal-sftp
"""
SSH_CONFIG = """
Host *
  IdentityFile {folder}/ssh/id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


@dataclass(frozen=True)
class Node:
    """One host: the process that holds its namespaces, and its address."""

    name: str
    holder: int
    address: str


class Cluster:
    """Hosts that are up. `Cluster.start` makes one, `down` ends it."""

    def __init__(self, folder: Path, hosts: Sequence[Node]) -> None:
        self.folder = folder
        self.hosts = {host.name: host for host in hosts}

    @property
    def nodes(self) -> list[str]:
        """All but the login host."""
        return [name for name in self.hosts if name != LOGIN]

    @property
    def disk(self) -> Path:
        """A folder that every host has for itself."""
        return self.folder / "disk"

    @classmethod
    def start(cls, nodes: int = 2, slurm: bool = True) -> "Cluster":
        """Boot a login host and so many nodes.

        Raises:
            AssertionError: a part does not come up; its log is in the message.
        """
        folder = ROOT / secrets.token_hex(2)
        folder.mkdir(parents=True, mode=0o755)
        (folder / "disk").mkdir()
        names = [LOGIN, *(f"n{number}" for number in range(1, nodes + 1))]
        subnet = f"10.{100 + secrets.randbelow(100)}.{secrets.randbelow(250)}"
        hosts = [Node(name, 0, f"{subnet}.{number}") for number, name in enumerate(names, start=1)]
        _write_keys(folder, hosts)
        cluster = cls(folder, ())
        try:
            for host in hosts:
                cluster.hosts[host.name] = _boot(folder, host)
            cluster.save()
            cluster._join(subnet)
            sshd = str(shutil.which("sshd", path=PATH))  # it calls itself again, by its whole path
            for name in cluster.hosts:
                cluster.spawn(name, [sshd, "-D", "-f", str(folder / "sshd_config")], f"{name}/sshd.log")
            if slurm:
                cluster._start_slurm()
            _until(lambda: all(cluster.run(LOGIN, ["ssh", name, "true"]).returncode == 0 for name in cluster.nodes),
                   "ssh does not answer", folder)  # fmt: skip
        except BaseException:
            cluster.down()
            raise
        return cluster

    @classmethod
    def all(cls) -> "list[Cluster]":
        """What is up on this machine, by anyone."""
        found = []
        for path in sorted(ROOT.glob("*/hosts.json")):
            hosts = [Node(**host) for host in json.loads(path.read_text())]
            found.append(cls(path.parent, hosts))
        return found

    def save(self) -> None:
        """Let others find it."""
        text = json.dumps([asdict(host) for host in self.hosts.values()])
        (self.folder / "hosts.json").write_text(text)

    def words(self, host: str, command: Sequence[str], cwd: Path | None = None) -> list[str]:
        """A command as it is run on a host."""
        target = ["nsenter", "-t", str(self.hosts[host].holder), *NAMESPACES]
        return [*target, f"--wd={cwd or Path.cwd()}", "--", *command]

    def run(
        self,
        host: str,
        command: Sequence[str],
        cwd: Path | None = None,
        seconds: float = 300,
        environment: Mapping[str, str] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command on a host to its end."""
        return subprocess.run(
            self.words(host, command, cwd), env=self._environment(environment or {}), capture_output=True, text=True,
            timeout=seconds, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def popen(
        self,
        host: str,
        command: Sequence[str],
        output: Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> "subprocess.Popen[bytes]":
        """Start a command on a host, with its words in a file."""
        with output.open("wb") as file:
            return subprocess.Popen(
                self.words(host, command, cwd), env=self._environment(environment or {}), stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def spawn(self, host: str, command: Sequence[str], log: str) -> None:
        """Start a daemon of a host."""
        path = self.folder / log
        path.parent.mkdir(parents=True, exist_ok=True)
        self.popen(host, command, path)

    def link(self, host: str, up: bool) -> None:
        """Plug a host's network cable in, or pull it."""
        self.run(LOGIN, ["ip", "link", "set", f"to-{host}", "up" if up else "down"])

    def kill(self, host: str) -> None:
        """Cut a host's power."""
        os.kill(self.hosts[host].holder, signal.SIGKILL)

    def processes(self, host: str, word: str) -> list[int]:
        """Processes of a host, by its own numbers, whose command line has a word."""
        found = self.run(host, ["pgrep", "-f", "--", word]).stdout.split()
        return [int(number) for number in found]

    def down(self) -> None:
        """End all hosts and what runs on them, and remove their files."""
        holders = [host.holder for host in self.hosts.values()]
        for holder in holders:
            try:
                os.kill(holder, signal.SIGKILL)
            except ProcessLookupError:
                continue
        until(lambda: not any(map(alive, holders)), seconds=10)
        if (self.folder / CREATED).exists():
            for path in (self.folder / CREATED).read_text().split():
                with suppress(OSError):  # someone uses it by now
                    Path(path).rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)
        if ROOT.is_dir() and not any(ROOT.iterdir()):
            ROOT.rmdir()

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        own = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}
        return {**os.environ, **own, **more}

    def _join(self, subnet: str) -> None:
        """A bridge on the login host, and a cable to each node."""
        self._do(LOGIN, "ip link add bridge type bridge")
        self._do(LOGIN, f"ip addr add {self.hosts[LOGIN].address}/24 dev bridge")
        self._do(LOGIN, "ip link set bridge up")
        for name in self.nodes:
            host = self.hosts[name]
            # The holder's number is the machine's, which the login host's own /proc does not have.
            words = f"ip link add to-{name} type veth peer name eth0 netns /proc/{host.holder}/ns/net"
            subprocess.run(["nsenter", "-t", str(self.hosts[LOGIN].holder), "--net", *words.split()], check=True,
                           env=self._environment({}))  # fmt: skip
            self._do(LOGIN, f"ip link set to-{name} master bridge up")
            self._do(name, f"ip addr add {host.address}/24 dev eth0")
            self._do(name, "ip link set eth0 up")

    def _do(self, host: str, command: str) -> None:
        done = self.run(host, command.split())
        if done.returncode:
            raise RuntimeError(f"{host}: {command}: {done.stderr.strip()}")

    def _start_slurm(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (munge / "key").write_bytes(secrets.token_bytes(1024))
        (munge / "key").chmod(0o400)
        options = {"key-file": "key", "pid-file": "pid", "socket": "socket", "log-file": "log", "seed-file": "seed"}
        words = [f"--{name}={munge / file}" for name, file in options.items()]
        self.spawn(LOGIN, ["munged", "--force", "--foreground", *words], "munge/output")
        _until((munge / "socket").exists, "munged does not answer", self.folder)
        self.spawn(LOGIN, ["slurmctld", "-D"], "slurmctld.output")
        for name in self.nodes:
            (self.folder / name / "spool").mkdir(parents=True, exist_ok=True)
            self.spawn(name, ["slurmd", "-D", "-N", name], f"{name}/slurmd.output")

        def idle() -> bool:
            states = self.run(LOGIN, ["sinfo", "-h", "-N", "-p", "main", "-o", "%t"]).stdout.split()
            return len(states) == len(self.nodes) and set(states) == {"idle"}

        _until(idle, "Slurm's nodes do not come up", self.folder)


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.geteuid() != 0:
        return "it needs root"
    packages = sorted({package for program, package in PACKAGES.items() if shutil.which(program, path=PATH) is None})
    if packages:
        return f"it needs Debian's {' '.join(packages)}"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "--mount-proc", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else f"namespaces are not allowed: {tried.stderr.decode().strip()}"


def _write_keys(folder: Path, hosts: Sequence[Node]) -> None:
    ssh = folder / "ssh"
    ssh.mkdir(mode=0o700)
    for path in (ssh / "id", folder / "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    (ssh / "config").write_text(SSH_CONFIG.format(folder=folder))
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts))
    nodes = "\n".join(f"NodeName={host.name} NodeAddr={host.address}" for host in hosts[1:])
    text = SLURM_CONF.format(folder=folder, login=hosts[0].address, nodes=nodes, cores=len(os.sched_getaffinity(0)))
    (folder / "slurm.conf").write_text(text)
    (folder / "slurmctld").mkdir()


def _boot(folder: Path, host: Node) -> Node:
    """A process in namespaces of its own, as the first of its host."""
    disk = folder / host.name / "disk"
    disk.mkdir(parents=True)
    ready = folder / host.name / "up"
    home = Path.home() / ".ssh"
    script = f"""
set -e
hostname {host.name}
mount --bind {disk} {folder}/disk
mount --bind {folder}/hosts /etc/hosts
mount -t tmpfs -o mode=755 none /run/sshd 2>/dev/null || true
mkdir -p {home}
mount --bind {folder}/ssh {home}
ip link set lo up
touch {ready}
trap : TERM
while :; do sleep 3600 & wait $!; done
"""
    for needed in (Path("/run/sshd"), home):
        if not needed.exists():
            needed.mkdir(parents=True)
            with (folder / CREATED).open("a") as file:
                file.write(f"{needed}\n")
    process = subprocess.Popen(
        ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
        stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "PATH": PATH},
        stdout=subprocess.DEVNULL, stderr=(folder / host.name / "boot.log").open("wb"),
    )  # fmt: skip
    _until(ready.exists, f"{host.name} does not boot", folder)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return Node(host.name, int(children[0]), host.address)


def _until(ready: Callable[[], Any], problem: str, folder: Path) -> None:
    def logs() -> str:
        paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".log", ".output") and path.is_file()]
        return "\n".join([problem, *(f"{path}: {path.read_text(errors='replace')[-1000:]}" for path in paths)])

    until(ready, UP_SECONDS, logs)
