"""Who runs what where: the hosts of a run, their ranks, and what each rank's environment tells it.

The variables are those that DeepSpeed's launcher and torchrun set, so that a worker does not care who started it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bigtune.launch.hosts import Host


@dataclass(frozen=True, slots=True)
class Place:
    """One rank: where it runs, and what tells it so."""

    rank: int
    host: Host
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Plan:
    """Ranks of hosts in their order.

    Args:
        address: of the first host, under which all others reach it.
        port: free on the first host.
        devices: of each host, by name, how CUDA knows the GPUs of its slots; none where there are none.
        interfaces: of each host, by name, the network interface that reaches the others.
    """

    hosts: Sequence[Host]
    address: str
    port: int
    devices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    interfaces: Mapping[str, str] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return sum(len(host.slots) for host in self.hosts)

    def places(self) -> Iterator[Place]:
        """Every rank, from 0 on."""
        rank = 0
        for node, host in enumerate(self.hosts):
            shared = self._of_host(node, host)
            for local_rank in range(len(host.slots)):
                yield Place(rank, host, {**shared, "RANK": str(rank), "LOCAL_RANK": str(local_rank)})
                rank += 1

    def _of_host(self, node: int, host: Host) -> dict[str, str]:
        found = {
            "MASTER_ADDR": self.address, "MASTER_PORT": str(self.port), "WORLD_SIZE": str(self.world_size),
            "LOCAL_SIZE": str(len(host.slots)), "LOCAL_WORLD_SIZE": str(len(host.slots)),
            "CROSS_RANK": str(node), "CROSS_SIZE": str(len(self.hosts)),
        }  # fmt: skip
        devices = self.devices.get(host.name, ())
        if devices:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(devices[slot] for slot in host.slots)
        else:
            found["DS_ACCELERATOR"] = "cpu"
        if host.name in self.interfaces:
            found["GLOO_SOCKET_IFNAME"] = found["NCCL_SOCKET_IFNAME"] = self.interfaces[host.name]
        return found
