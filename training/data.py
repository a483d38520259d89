"""Token shards -> batches, in an order that (seed, step) alone decides: there is no state to save.

The windows of an epoch are visited in groups, one group after the other and shuffled within: token streams share a group
as far as its permutation stays small, shards of samples are a group each (Amber's chunks one after the other, as
published). A group holds a permutation of its own windows, nothing else: any step of any epoch can be rebuilt alone,
also in the middle of a shard, and each of N processes can take its rows of the batch that one process would see.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from fbiedge.errors import UsageError

from .shards import Shard

GROUP_WINDOWS = 1 << 24  # 128 MB of permutation: 34 billion tokens in windows of 2048


class Batches:
    """Batch number `step` of an endless shuffled stream of windows of sequence_length + 1 tokens.

    A stream is cut at a random phase into windows that share only their border token, in each epoch at another or, for
    `same_windows`, at that of the first; a sample is cut from its start, and what is left of it is not used. Sample number
    i is window i mod windows of epoch i div windows.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        batch_size: int,
        sequence_length: int,
        seed: int,
        name: str = "training text",
        group_windows: int = GROUP_WINDOWS,
        same_windows: bool = False,
    ) -> None:
        self.same_windows = same_windows
        self.shards, self.batch_size, self.sequence_length, self.seed = shards, batch_size, sequence_length, seed
        counts = [_windows(shard, sequence_length) for shard in shards]
        self.windows = sum(counts)
        if self.windows < 1:
            tokens = sum(len(shard.tokens) for shard in shards)
            raise UsageError(
                f"the {name} has {tokens} tokens, expected {2 * sequence_length + 1} or more for sequences of "
                f"{sequence_length}; give more text or shorter sequences"
            )
        self._groups = _grouped(shards, counts, group_windows)
        self._group_ends = np.array(list(accumulate(group.windows for group in self._groups)))
        self._at = (-1, -1)  # epoch and group of what follows
        self._phases = self._order = np.empty(0, np.int64)

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and next-token targets of optimizer step `step`, each int64 [rows, sequence_length].

        `rows` of the batch_size that the step has; no others are read.
        """
        samples = range(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        windows = np.empty((len(samples), self.sequence_length + 1), np.int64)
        for row, sample in enumerate(samples):
            windows[row] = self._window(sample)
        return windows[:, :-1], windows[:, 1:]

    def _window(self, sample: int) -> npt.NDArray[np.unsignedinteger]:
        epoch, index = divmod(sample, self.windows)
        at = int(np.searchsorted(self._group_ends, index, side="right"))
        group = self._groups[at]
        if (epoch, at) != self._at:
            rng = self._rng(epoch, at)
            self._phases = rng.integers(self.sequence_length, size=len(group.ends))
            self._order = rng.permutation(group.windows)
            if self.same_windows:
                self._phases = self._rng(0, at).integers(self.sequence_length, size=len(group.ends))
            self._at = epoch, at
        chosen = int(self._order[index - (self._group_ends[at] - group.windows)])
        which = int(np.searchsorted(group.ends, chosen, side="right"))
        shard = self.shards[group.first + which]
        within = chosen - (int(group.ends[which - 1]) if which else 0)
        if shard.sample_length:
            sample_in_shard, part = divmod(within, (shard.sample_length - 1) // self.sequence_length)
            start = sample_in_shard * shard.sample_length + part * self.sequence_length
        else:
            start = int(self._phases[which]) + within * self.sequence_length
        return shard.tokens[start : start + self.sequence_length + 1]

    def _rng(self, epoch: int, group: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, *([group] if group else [])])


class _Group:
    """Shards that are shuffled together: those from number `first` on; `ends` are their running numbers of windows."""

    def __init__(self, first: int, counts: Sequence[int]) -> None:
        self.first, self.ends = first, np.array(list(accumulate(counts)))
        self.windows = int(self.ends[-1])


def _windows(shard: Shard, length: int) -> int:
    if not shard.sample_length:
        return max(0, (len(shard.tokens) - 1) // length - 1)  # one is lost to the phase
    if length >= shard.sample_length:
        raise UsageError(
            f"sequences of {length} tokens need samples of {length + 1}; those of {shard.path} have "
            f"{shard.sample_length}; choose a shorter --sequence-length"
        )
    return len(shard.tokens) // shard.sample_length * ((shard.sample_length - 1) // length)


def _grouped(shards: Sequence[Shard], counts: Sequence[int], most: int) -> list[_Group]:
    groups: list[_Group] = []
    first = windows = 0
    for at in range(1, len(shards) + 1):
        windows += counts[at - 1]
        together = at < len(shards) and not shards[at].sample_length and not shards[first].sample_length
        if not together or windows + counts[at] > most:
            groups.append(_Group(first, counts[first:at]))
            first, windows = at, 0
    return groups
