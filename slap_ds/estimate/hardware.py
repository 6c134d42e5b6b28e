"""What is assumed of GPUs and of the network between them. None of it was measured here."""

from __future__ import annotations

from dataclasses import dataclass

NODE_GPUS = 8
NVLINK, NETWORK = 200e9, 40e9  # bytes a second that a GPU gathers, inside a node and between nodes


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    gib: float  # what its driver leaves to programs
    flops_per_s: float  # what dense bf16 training reaches, about two fifths of the peak


GPUS = {
    "a100-40": Gpu("A100 40 GB", 39, 130e12),
    "a100-80": Gpu("A100 80 GB", 79, 130e12),
    "h100": Gpu("H100 80 GB", 79, 400e12),
    "h200": Gpu("H200", 139, 400e12),
    "b200": Gpu("B200", 178, 900e12),
}


@dataclass(frozen=True)
class Hardware:
    """One GPU and its network; the defaults are an H100's and a 400 Gb/s port's, derated."""

    flops_per_s: float = GPUS["h100"].flops_per_s
    gather_bytes_per_s: float = NETWORK  # all-gather of weights, per GPU
    latency_s: float = 20e-6  # of one collective, per doubling of ranks
    pair_dims_per_s: float = 13e12  # farthest points: pairs * dimensions; derived, not measured

    @classmethod
    def of(cls, gpu: Gpu, gpus: int) -> Hardware:
        """`gpus` of a kind, 8 in a node."""
        return cls(gpu.flops_per_s, NVLINK if gpus <= NODE_GPUS else NETWORK)


def needed_gib(counted: float) -> float:
    """GiB that a GPU must have where `counted` of them are held: fragments of the allocator, and
    what CUDA's context and NCCL's buffers take."""
    return 1.1 * counted + 2
