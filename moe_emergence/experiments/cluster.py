"""GPUs in nodes: how long their collectives take, and the rates at which they compute.

Letters: N ranks, one a GPU. A collective's time is a start and the bytes of a rank over its links,
of which those in the node and those to other nodes work side by side.
"""

from dataclasses import dataclass

from moe_emergence.settings import check

NVLINK_BYTES_PER_S = 450e9
"""Each way of a GPU; NVIDIA's data sheets of the H100 SXM and the H200 say 900 GB/s for both."""
NETWORK_BYTES_PER_S = 50e9
"""Each way of a GPU, with a network card of 400 Gb/s for each, as in NVIDIA's DGX H100 and H200."""
LINK_SHARE = 0.8
"""Of these that a collective reaches; assumed."""
COLLECTIVE_S = 20e-6
"""To start and end a collective; assumed."""
SYNC_S = 50e-6
"""That the device idles when the host waits for split sizes; assumed."""
DENSE_FLOPS_PER_S = 197e12
"""Of all products but the experts', with what lies between them. This and the next are fitted to
three steps of GPT-2 small in bf16 on an H200, as CUDA graphs (docs/results/h200/third.json): dense
with 8,192 tokens, mixtures with 4,096 and 8,192."""
UPDATE_S = 34.5e-12
"""To clip and update one parameter with AdamW."""


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes, and what one of them does in a second: an H200's where nothing else is said.

    Raises:
        ValueError: for GPUs that do not fill their nodes.
    """

    gpus: int
    """N."""
    gpus_per_node: int = 8
    memory_bytes: float = 141e9
    """Of a GPU; this and the next by NVIDIA's data sheet."""
    memory_bytes_per_s: float = 4.8e12
    dense_flops_per_s: float = DENSE_FLOPS_PER_S
    update_s: float = UPDATE_S
    nvlink_bytes_per_s: float = LINK_SHARE * NVLINK_BYTES_PER_S
    """Each way of a GPU, to those of its node."""
    network_bytes_per_s: float = LINK_SHARE * NETWORK_BYTES_PER_S
    """Each way of a GPU, to those of other nodes."""
    latency_s: float = COLLECTIVE_S
    sync_s: float = SYNC_S

    def __post_init__(self) -> None:
        check(self.gpus >= 1, "--gpus", self.gpus, "give at least 1")
        check(self.gpus_per_node >= 1, "--gpus-per-node", self.gpus_per_node, "give at least 1")
        check(
            self.gpus % self.node == 0,
            "--gpus",
            self.gpus,
            f"give whole nodes: a multiple of --gpus-per-node ({self.gpus_per_node}), or fewer",
        )

    @property
    def node(self) -> int:
        """Ranks in one node."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def groups(self) -> tuple[int, ...]:
        """Sizes of groups of neighbours that share out all ranks, each in one node or of nodes."""
        fits = (size for size in range(1, self.gpus + 1) if self.gpus % size == 0)
        return tuple(size for size in fits if size % self.node == 0 or self.node % size == 0)

    def gather_s(self, size: float, members: int, in_node: int) -> float:
        """An all-gather that leaves `size` bytes with each member, or a reduce-scatter of as many.

        `in_node` members share a node and pass on to each other what every one brings in.
        """
        return self._collective_s(size * (1 - 1 / in_node), size * (1 / in_node - 1 / members))

    def exchange_s(self, size: float, members: int, in_node: int) -> float:
        """An all-to-all of `size` bytes a member, as many for each, the member itself included."""
        share = size / members
        return self._collective_s(share * (in_node - 1), share * (members - in_node))

    def _collective_s(self, nvlink: float, network: float) -> float:
        if nvlink == network == 0:
            return 0.0
        links = nvlink / self.nvlink_bytes_per_s, network / self.network_bytes_per_s
        return self.latency_s + max(links)
