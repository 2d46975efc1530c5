"""Everything random about a sample, as pure functions of (seed, epoch, sample index).

No state is carried from one draw to the next, so a sample's crop, flip and mask are the same whichever worker
or rank loads it, and after any restart.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

_WORD = (1 << 64) - 1


def generator(seed: int, epoch: int, index: int, purpose: str) -> torch.Generator:
    """A generator of its own for one purpose ("crop", "draw", …) of one sample in one epoch."""
    words = np.array([seed & _WORD, epoch, index, crc32(purpose.encode())], dtype=np.uint64)
    # Four words of fixed width, so no two keys share an encoding; SeedSequence's mix is specified and stable.
    (state,) = np.random.SeedSequence(words.view(np.uint32).tolist()).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


@contextmanager
def global_generators(generator: torch.Generator) -> Iterator[None]:
    """Inside, Python's, numpy's and torch's global generators on the CPU go on from numbers of `generator`;
    afterwards they are as before. For libraries that draw from no others."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seeds = torch.randint(1 << 32, (3,), generator=generator).tolist()
    try:
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        torch.default_generator.manual_seed(seeds[2])  # torch.manual_seed would seed the GPUs as well
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order of one epoch: a permutation of n sample indices, long [n]."""
    return torch.randperm(n, generator=generator(seed, epoch, 0, "permutation"))


def block_permutation(seed: int, epoch: int, shard_sizes: Sequence[int], shards_per_block: int) -> Tensor:
    """The order of one epoch over samples that lie shard after shard: a permutation, long [sum of sizes].

    The shards are permuted and taken `shards_per_block` at a time, the samples of such a block permuted.
    """
    ends = list(accumulate(shard_sizes))
    spans = [torch.arange(end - size, end) for size, end in zip(shard_sizes, ends, strict=True)]
    shards = torch.randperm(len(spans), generator=generator(seed, epoch, 0, "shards")).tolist()
    blocks = []
    for number, start in enumerate(range(0, len(shards), shards_per_block)):
        block = torch.cat([spans[shard] for shard in shards[start : start + shards_per_block]])
        draws = generator(seed, epoch, number, "block")
        blocks.append(block[torch.randperm(len(block), generator=draws)])
    return torch.cat(blocks)


def replacement(seed: int, epoch: int, index: int, attempt: int, n: int) -> int:
    """The sample that stands in for an unreadable one at the given attempt (0, 1, …)."""
    draws = generator(seed, epoch, index, f"replacement {attempt}")
    return int(torch.randint(n, (), generator=draws))
