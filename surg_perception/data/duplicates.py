# SPDX-License-Identifier: Apache-2.0
"""The same recording in two videos: re-encoded, scaled, cut, letterboxed, with a logo, shifted in time.

Frames that look alike vote for the shift in time between the two videos; a shift with enough votes is then
checked frame by frame, and what agrees over a stretch of time, at this shift better than at others, is an overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surg_perception.data.video_survey import HASH_BITS, Survey

# Share of the 256 bits that differ. Measured on seven Cholec80 clips (64-bit hashes do not keep these apart):
# same frame after scaling, compression, a logo and 1 % of crop, 99 % of frames below 0.31; half of the frames a
# quarter of a second apart below 0.34; frames of different surgeries, 0.1 % below 0.37; of one surgery at other
# times, 0.1 % below 0.31, which is why frames must agree over a stretch of time.
_VOTE_BITS = round(0.32 * HASH_BITS)
_AGREE_BITS = round(0.34 * HASH_BITS)

_VOTER_EVERY_S = 2.0
_CANDIDATES = 8
_GAP_S = 5.0
_LEAST_AGREEMENT = 0.5
LEAST_OVERLAP_S = 5.0
# At other times a true copy differs by so many bits more; measured: copies 25 and more, a still camera at most 3.
_LEAST_CONTRAST_BITS = 12
_CONTRAST_S = 3.0
_WHOLE_SHARE = 0.8
_SAME_LENGTH_SHARE = 0.02


@dataclass(frozen=True)
class Overlap:
    """A stretch that two videos share.

    Attributes:
        start_s, end_s: in the first video, seconds.
        offset_s: time in the second video less time in the first.
        score: share of the stretch's frames that agree, 0.5 to 1.
        mirrored: the second shows the mirror image.
    """

    start_s: float
    end_s: float
    offset_s: float
    score: float
    mirrored: bool = False

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class DuplicatePair:
    """Two videos with what they share, longest overlap first."""

    first: str
    second: str
    overlaps: tuple[Overlap, ...]

    @property
    def overlap_s(self) -> float:
        """Seconds shared."""
        return sum(overlap.duration_s for overlap in self.overlaps)

    @property
    def score(self) -> float:
        """Share of agreeing frames, averaged over the shared time."""
        return sum(overlap.score * overlap.duration_s for overlap in self.overlaps) / self.overlap_s

    def spans_of(self, name: str) -> list[tuple[float, float]]:
        """Shared stretches in the time of one of the two videos."""
        shift = [0.0 if name == self.first else overlap.offset_s for overlap in self.overlaps]
        return sorted((o.start_s + s, o.end_s + s) for o, s in zip(self.overlaps, shift, strict=True))


@dataclass(frozen=True)
class DropProposal:
    """Leave out a stretch (None, None: the whole) of a video, since another that is kept shows it too."""

    name: str
    kept: str
    start_s: float | None
    end_s: float | None
    overlap: Overlap
    score: float


def find_duplicates(
    surveys: Mapping[str, Survey],
    *,
    mirrored: bool = False,
    least_overlap_s: float = LEAST_OVERLAP_S,
    progress: Callable[[int, int], None] | None = None,
) -> list[DuplicatePair]:
    """Pairs of videos that share at least least_overlap_s of one recording, most shared time first.

    With mirrored, a left-right mirror image is found too (twice the work). Every pair of videos is compared:
    about 10 ms for two videos of 12 minutes. progress is called with (pairs done, pairs in all).
    """
    names = sorted(surveys)
    prepared = {name: _Prepared(surveys[name]) for name in names}
    pairs = []
    done, in_all = 0, len(names) * (len(names) - 1) // 2
    for k, second in enumerate(names):
        for first in names[:k]:
            overlaps = _overlaps(prepared[first], prepared[second], mirrored, least_overlap_s)
            if overlaps:
                pairs.append(DuplicatePair(first, second, tuple(overlaps)))
            done += 1
            if progress:
                progress(done, in_all)
    return sorted(pairs, key=lambda pair: -pair.overlap_s)


def duplicate_groups(pairs: Sequence[DuplicatePair]) -> list[tuple[str, ...]]:
    """Videos joined by overlaps, directly or through others; each group sorted by name."""
    group_of: dict[str, set[str]] = {}
    for pair in pairs:
        joined = group_of.get(pair.first, {pair.first}) | group_of.get(pair.second, {pair.second})
        for name in joined:
            group_of[name] = joined
    return sorted({tuple(sorted(group)) for group in group_of.values()})


def propose_drops(
    pairs: Sequence[DuplicatePair], surveys: Mapping[str, Survey], stays: Collection[str] = ()
) -> list[DropProposal]:
    """What to leave out so that every shared stretch is kept once.

    Of each group the longest video is kept; of those within 2 % of its length the one with most pixels inside its
    black border. What the kept ones show is left out of the others: the whole where one shows 80 % of it, else the
    stretch. What is left is judged again in the same way, so a video that only shares a part with a kept one is not
    lost. Nothing is left out of videos in `stays`, which go before all others.
    """
    by_pair = {frozenset((pair.first, pair.second)): pair for pair in pairs}
    proposals: list[DropProposal] = []
    for group in duplicate_groups(pairs):
        waiting, kept = set(group), list[str]()
        while waiting:
            asked = waiting & set(stays) or waiting
            longest_s = max(surveys[name].duration_s for name in asked)
            near = [name for name in asked if surveys[name].duration_s >= (1.0 - _SAME_LENGTH_SHARE) * longest_s]
            best = max(sorted(near), key=lambda name: surveys[name].pixels)
            waiting.remove(best)
            kept.append(best)
            for name in sorted(waiting):
                pair = by_pair.get(frozenset((best, name)))
                if pair and name not in stays and pair.overlap_s >= _WHOLE_SHARE * surveys[name].duration_s:
                    proposals.append(DropProposal(name, best, None, None, pair.overlaps[0], pair.score))
                    waiting.remove(name)
        for k, name in enumerate(kept):
            for other in kept[:k] if name not in stays else ():
                pair = by_pair.get(frozenset((other, name)))
                for overlap in pair.overlaps if pair else ():
                    shift_s = overlap.offset_s if pair and name == pair.second else 0.0
                    span = overlap.start_s + shift_s, overlap.end_s + shift_s
                    proposals.append(DropProposal(name, other, *span, overlap, overlap.score))
    return proposals


class _Prepared:
    """A survey with its voters: distinct frames at least 2 s apart."""

    def __init__(self, survey: Survey) -> None:
        self.times_s = survey.times_s
        self.usable = survey.usable
        self.step_s = float(np.diff(self.times_s).min()) if len(self.times_s) > 1 else 1.0
        self.duration_s = survey.duration_s
        self.hashes = survey.hashes
        self.mirrored = survey.mirrored
        voters, last_s = [], -np.inf
        for k in np.flatnonzero(survey.distinct):
            if self.times_s[k] - last_s >= _VOTER_EVERY_S - 1e-6:
                voters.append(int(k))
                last_s = self.times_s[k]
        self.voters = np.array(voters, np.int64)


def _signs(hashes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 [n, 256] of ±1, so that a product of two counts the bits that agree less those that differ."""
    return np.unpackbits(hashes, axis=1).astype(np.float32) * 2.0 - 1.0


def _overlaps(first: _Prepared, second: _Prepared, mirrored: bool, least_overlap_s: float) -> list[Overlap]:
    found: list[Overlap] = []
    for flip in (False, True) if mirrored else (False,):
        hashes = second.mirrored if flip else second.hashes
        for offset_s in _voted_offsets(first, second, hashes):
            found += _agreeing_stretches(first, second, hashes, offset_s, flip, least_overlap_s)
    chosen: list[Overlap] = []
    for overlap in sorted(found, key=lambda o: -o.score * o.duration_s):
        if all(
            _apart(overlap, other, 0.0, 0.0) and _apart(overlap, other, overlap.offset_s, other.offset_s)
            for other in chosen
        ):
            chosen.append(overlap)
    return sorted(chosen, key=lambda o: -o.duration_s)


def _apart(one: Overlap, other: Overlap, shift_one_s: float, shift_other_s: float) -> bool:
    """Whether less than half of either stretch lies in the other one."""
    common_s = min(one.end_s + shift_one_s, other.end_s + shift_other_s) - max(
        one.start_s + shift_one_s, other.start_s + shift_other_s
    )
    return common_s < 0.5 * min(one.duration_s, other.duration_s)


def _voted_offsets(first: _Prepared, second: _Prepared, hashes: NDArray[np.uint8]) -> list[float]:
    """Offsets in s that the most frames which look alike speak for."""
    usable = np.flatnonzero(second.usable)
    if not len(first.voters) or not len(usable):
        return []
    agreeing = _signs(first.hashes[first.voters]) @ _signs(hashes[usable]).T
    voter, match = np.nonzero(agreeing >= HASH_BITS - 2 * _VOTE_BITS)
    if not len(voter):
        return []
    offsets_s = second.times_s[usable[match]] - first.times_s[first.voters[voter]]
    step_s = max(first.step_s, second.step_s)
    bins = np.round(offsets_s / step_s).astype(np.int64)
    low = int(bins.min()) - 1
    votes = np.bincount(bins - low, minlength=int(bins.max()) - low + 2)
    near = np.convolve(votes, [1, 1, 1], "same")
    chosen: list[float] = []
    for _ in range(_CANDIDATES):
        best = int(near.argmax())
        if near[best] < 2:
            break
        chosen.append((best + low) * step_s)
        near[max(0, best - 2) : best + 3] = 0
    return chosen


def _agreeing_stretches(
    first: _Prepared, second: _Prepared, hashes: NDArray[np.uint8], near_s: float, flip: bool, least_overlap_s: float
) -> list[Overlap]:
    """Stretches over which frames agree at an offset near near_s; the offset is refined by one sample.

    They must agree better than 3 s earlier and later: what a still camera sees agrees at any offset.
    """
    best_bits, offset_s = np.inf, near_s
    step_s = max(first.step_s, second.step_s)
    for candidate_s in (near_s, near_s - step_s, near_s + step_s):
        _, bits = _bits_at(first, second, hashes, candidate_s, 0)
        if len(bits) and (mean := float(np.sort(bits)[: max(1, len(bits) // 2)].mean())) < best_bits:
            best_bits, offset_s = mean, candidate_s
    at, bits = _bits_at(first, second, hashes, offset_s, 1)
    times_s = first.times_s[at]
    elsewhere = [_bits_at(first, second, hashes, offset_s + shift, 1) for shift in (-_CONTRAST_S, _CONTRAST_S)]
    elsewhere_s = np.concatenate([first.times_s[there] for there, _ in elsewhere])
    elsewhere_bits = np.concatenate([other for _, other in elsewhere])
    stretches = []
    matched = np.flatnonzero(bits <= _AGREE_BITS)
    for run in np.split(matched, np.flatnonzero(np.diff(times_s[matched]) > _GAP_S) + 1) if len(matched) else ():
        inside = slice(int(run[0]), int(run[-1]) + 1)
        score = len(run) / (inside.stop - inside.start)
        start_s, end_s = float(times_s[run[0]]), float(times_s[run[-1]]) + first.step_s
        others = elsewhere_bits[(elsewhere_s >= start_s) & (elsewhere_s < end_s)]
        start_s, end_s = max(start_s, -offset_s), min(end_s, first.duration_s, second.duration_s - offset_s)
        if (
            end_s - start_s >= least_overlap_s
            and score >= _LEAST_AGREEMENT
            and len(others)
            and others.mean() - bits[inside].mean() >= _LEAST_CONTRAST_BITS
        ):
            stretches.append(Overlap(start_s, end_s, offset_s, score, flip))
    return stretches


def _bits_at(
    first: _Prepared, second: _Prepared, hashes: NDArray[np.uint8], offset_s: float, reach: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(usable frames of the first that have a counterpart, least bits in which it differs within ± reach samples)."""
    at = np.flatnonzero(first.usable)
    there = np.searchsorted(second.times_s, first.times_s[at] + offset_s - 0.5 * second.step_s)
    inside = (there < len(second.times_s)) & (first.times_s[at] + offset_s >= -0.5 * second.step_s)
    at, there = at[inside], there[inside]
    bits = np.full((2 * reach + 1, len(at)), HASH_BITS, np.int64)
    for row, shift in enumerate(range(-reach, reach + 1)):
        index = there + shift
        good = (index >= 0) & (index < len(second.times_s))
        good[good] &= second.usable[index[good]]
        differing = first.hashes[at[good]] ^ hashes[index[good]]
        bits[row, good] = np.unpackbits(differing, axis=1).sum(axis=1)
    least = bits.min(axis=0)
    compared = least < HASH_BITS
    return at[compared], least[compared]
