"""Machines made of namespaces: each has its own network, host name, processes and sshd.

    with Cluster(folder, 2) as cluster:
        cluster.nodes[0].run(["hostname"])      # node1

All hang on one bridge by an interface named eth0, as in a data centre; 10.77.0.N is nodeN. Nothing
outside the namespaces is touched but /etc/netns, which `ip netns exec` mounts over /etc inside.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOLS = ("ip", "unshare", "nsenter", "ssh-keygen", "pdsh", "mpirun", "mpiexec.hydra")
SSHD = "/usr/sbin/sshd"
NET = "10.77.0"
SSH_CONFIG = """\
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
SSHD_CONFIG = """\
ListenAddress {address}:22
HostKey {folder}/host-key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile none
"""


def why_not() -> str | None:
    """What this machine lacks for a cluster, in words; None: nothing."""
    if os.geteuid() != 0:
        return "nodes are network namespaces, which only root can make"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if not Path(SSHD).exists():
        missing.append("sshd")
    if missing:
        return f"not installed: {', '.join(missing)} (tests/nodes/install.sh installs them)"
    probe = f"slap-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


@dataclass
class Node:
    name: str
    address: str
    namespace: str
    holder: subprocess.Popen[bytes] | None = None
    pid: int = 0  # its sshd, process 1 inside

    def start(
        self, command: Sequence[str], environ: Mapping[str, str], cwd: Path, log: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command on this node; what it prints goes to `log`."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--uts", "--pid"]
        with log.open("wb") as file:
            return subprocess.Popen(
                [*enter, f"--wdns={cwd}", *command],
                env={**environ},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def cut(self) -> None:
        """Pull this node's plug out of the network."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def plug(self) -> None:
        _ip("-n", self.namespace, "link", "set", "eth0", "up")

    def processes(self, word: str) -> list[str]:
        """Command lines of this node's processes that contain `word`."""
        return list(self.pids(word).values())

    def pids(self, word: str) -> dict[int, str]:
        """The same by process, as seen from outside the node."""
        assert self.pid
        mine = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns/pid") == mine:
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found |= {int(folder.name): line} if word in line else {}
            except OSError:  # it has just ended
                continue
        return found


@dataclass
class Cluster:
    """`count` nodes; their keys and logs live in `folder`."""

    folder: Path
    count: int
    nodes: list[Node] = field(default_factory=list)

    def __enter__(self) -> Cluster:
        for name in ("key", "host-key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name]
            subprocess.run(command, check=True)
        os.makedirs("/run/sshd", exist_ok=True)
        prefix = f"slap{os.getpid()}"
        self.nodes = [
            Node(f"node{i}", f"{NET}.{i}", f"{prefix}-{i}") for i in range(1, self.count + 1)
        ]
        try:
            self._connect(f"{prefix}-net")
            for node in self.nodes:
                self._boot(node)
            for node in self.nodes:
                self._wait_for_sshd(node)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """End every process of every node, then remove the namespaces."""
        for node in self.nodes:
            if node.holder is not None:
                # Process 1 takes all others of its space with it.
                if node.pid and node.holder.poll() is None:
                    os.kill(node.pid, signal.SIGKILL)
                node.holder.kill()
                node.holder.wait(10)
        for namespace in [node.namespace for node in self.nodes] + [self._switch]:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
            shutil.rmtree(f"/etc/netns/{namespace}", ignore_errors=True)

    @property
    def _switch(self) -> str:
        return f"slap{os.getpid()}-net"

    def _connect(self, switch: str) -> None:
        """A bridge in a namespace of its own, a cable to each node."""
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for node in self.nodes:
            space = node.namespace
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            cable = ["type", "veth", "peer", "name", node.name, "netns", switch]
            _ip("link", "add", "name", "eth0", "netns", space, *cable)
            _ip("-n", switch, "link", "set", node.name, "master", "bridge", "up")
            _ip("-n", space, "addr", "add", f"{node.address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def _boot(self, node: Node) -> None:
        etc = Path("/etc/netns", node.namespace)
        (etc / "ssh").mkdir(parents=True)
        names = "".join(f"{each.address} {each.name}\n" for each in self.nodes)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (etc / "ssh/ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        config = SSHD_CONFIG.format(folder=self.folder, address=node.address)
        (etc / "ssh/sshd_config").write_text(config)
        # Own processes: pdsh's Ctrl-C handler ends jobs by a pattern, on every host it reaches.
        space = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        start = f"echo {node.name} >/proc/sys/kernel/hostname; exec {SSHD} -D -e"
        with (self.folder / f"{node.name}.sshd.log").open("wb") as log:
            node.holder = subprocess.Popen(
                ["ip", "netns", "exec", node.namespace, *space, "sh", "-c", start],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_for_sshd(self, node: Node) -> None:
        assert node.holder is not None
        children = Path(f"/proc/{node.holder.pid}/task/{node.holder.pid}/children")
        log = self.folder / f"{node.name}.sshd.log"
        deadline = time.monotonic() + 20
        while "listening" not in log.read_text().lower():
            assert node.holder.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{node.name}: no sshd after 20 s"
            time.sleep(0.05)
        node.pid = int(children.read_text().split()[0])


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
