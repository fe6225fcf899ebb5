"""Tile sizes and launch options of the attention kernels: chosen by what compilers spill, not yet by measurement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes of one kernel launch."""

    block_m: int
    """Rows (samples x tokens x grouped heads) a tile holds."""
    block_n: int
    """Shared keys a tile holds."""
    block_p: int
    """Own keys a tile holds."""
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """CUDA: registers a thread may use. Where it is set, ptxas would else spill some to fit one more block beside."""

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


def tile(size: int, largest: int) -> int:
    """The power of two that holds ``size``, from 16 (the least a matrix instruction takes) to ``largest``."""
    return max(16, min(largest, 1 << max(size - 1, 0).bit_length()))


def choose_config(
    kernel: str, rows: int, keys: int, own_span: int, block_d: int, element_size: int, *, dropout: bool, hip: bool,
    transform: bool = False, own_rope: bool = False, turned: bool = False, blackwell: bool = False,
) -> LaunchConfig:  # fmt: skip
    """The heuristic launch configuration.

    Args:
        kernel: ``forward``, ``dq``, ``dkdv``.
        rows: rows of one (condition, key/value head), K * T * H / Hkv.
        keys: keys of the shared segment (``dkdv``: of the segment at hand).
        own_span: own keys that a tile of rows can see at most.
        block_d: head dimension, rounded up to a power of two.
        element_size: bytes per element.
        dropout: the random words and the weights live side by side: smaller tiles for wide heads.
        hip: ROCm: 64 KiB of shared memory, so no software pipelining of large tiles.
        transform: queries are normed or rotated when they are loaded.
        own_rope: own keys are rotated when they are loaded.
        turned: queries and keys are rotated, here or before.
        blackwell: sm_100, where pipelined 16-bit forward tiles do not fit the registers.
    """
    forward = kernel == "forward"
    if element_size == 4:  # exact float32 products run on the ordinary cores, out of registers
        largest_m, largest_n = (32, 32) if block_d <= 64 else (16, 32) if block_d <= 128 else (16, 16)
        if (kernel == "dkdv" and block_d <= (32 if turned else 16)) or (kernel == "dq" and block_d == 128):
            largest_n = 16
    elif block_d <= 64:
        largest_m, largest_n = (128 if forward else 64), (32 if block_d == 16 and not forward else 64)
    elif block_d <= 128:
        largest_m, largest_n = (32 if forward and dropout else 64), (64 if forward and not dropout else 32)
    else:
        largest_m, largest_n = (64 if forward and not (dropout or transform) else 32), 32
    if transform and element_size == 4 and block_d > 64:
        largest_n = 16
    # Turning own keys holds each of them, its partner, a sine and a cosine in registers beside all else.
    largest_p = largest_n
    if own_rope and kernel == "dkdv":
        largest_n = max(16, largest_n // 2)
    elif own_rope:
        largest_p = 16
    block_m, block_n = tile(rows, largest_m), tile(keys, largest_n)
    block_p = tile(own_span, largest_p)
    # Four warps cannot hold these tiles of logits and their accumulators without spilling registers.
    crowded = block_m >= 128 if forward else block_m * block_n >= 64 * 64
    crowded = crowded or block_m * block_d >= 64 * 128
    if element_size == 4:
        crowded = {
            "forward": block_d >= 128 or (transform and block_d in (16, 64)) or (block_d == 64 and own_span == 0),
            "dq": block_d in (64, 256),
            "dkdv": block_d >= 64,
        }[kernel]
    elif kernel == "dq" and block_d > 128:
        crowded = False
    # ROCm: a wave has 64 lanes, and four of them may use 512 registers a lane, eight only 256.
    num_warps = 8 if crowded and not hip else 4
    # Pipelining holds the next tiles' addresses in registers: too many in these.
    unpipelined = hip or kernel == "dkdv" or element_size == 4 or (kernel == "dq" and (dropout or block_d > 128))
    unpipelined = unpipelined or (blackwell and forward and block_d <= 64)
    num_stages = 1 if unpipelined else 2
    turning = forward and transform and (element_size == 4 or block_d <= 32)
    narrow = block_d == 16 and (kernel, element_size) in (("dkdv", 4), ("dq", 2))
    max_registers = None if hip or not (turning or narrow) else 128 if turning and element_size == 2 else 255
    return LaunchConfig(block_m, block_n, block_p, num_warps, num_stages, max_registers)
