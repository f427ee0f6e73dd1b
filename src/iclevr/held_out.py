"""Label sets and pairs that training never shows: what tells composing from remembering.

A label set is what one picture shows, all of it. Of a held-out set no training picture shows
exactly these objects; of a held-out pair none shows both together, whatever else is there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

Labels = frozenset[str]
"""The names of the objects in one picture."""
SIZES = (2, 3)
"""Held-out sets have so many objects; every single object stays in training."""
THIRD_OBJECTS = 7
"""Of the 22 objects that can stand beside a pair: about as many sets of three to a set of two as
there are among all sets."""


@dataclass(frozen=True)
class HeldOut:
    """What training must not show."""

    sets: frozenset[Labels] = frozenset()
    pairs: frozenset[Labels] = frozenset()

    def holds(self, labels: Iterable[str]) -> bool:
        """Whether a picture of these objects is kept out of training."""
        labels = frozenset(labels)
        if labels in self.sets:
            return True
        return any(frozenset(pair) in self.pairs for pair in combinations(labels, 2))


NOTHING = HeldOut()
HELD_OUT_FILES = "seen", "unseen", "unseen_pairs"
"""Names of the JSON files of `held_out_conditions`."""


def choose_held_out(
    sets: Iterable[Labels], keep: Iterable[Labels], share_sets: float, share_pairs: float, seed: int
) -> HeldOut:
    """Draw what to hold out: a share of the sets of each size, and of the pairs, at random.

    Args:
        sets: label sets to choose among; pairs are chosen among those that stand together in one.
        keep: conditions that must stay in training, with all that is part of them: those of
            test.json and new_test.json, so that their figures can still be compared.
        share_pairs, share_sets: in [0, 1], of all pairs, and of all sets that hold no pair that is
            held out; fewer if too few are free.
    """
    rng = np.random.default_rng([seed, 0, 3])  # 0 to 2 are the renderer's
    keep, sets = list(keep), set(sets)

    def choose(candidates: set[Labels], share: float) -> list[Labels]:
        free = [labels for labels in candidates if not any(labels <= kept for kept in keep)]
        free.sort(key=sorted)  # sets have no order of their own
        number = min(len(free), round(share * len(candidates)))
        return [free[n] for n in rng.permutation(len(free))[:number]]

    together = {frozenset(pair) for labels in sets for pair in combinations(labels, 2)}
    pairs = HeldOut(pairs=frozenset(choose(together, share_pairs)))
    whole = {labels for labels in sets if not pairs.holds(labels)}  # nothing counts twice
    chosen = [choose({s for s in whole if len(s) == size}, share_sets) for size in SIZES]
    return HeldOut(frozenset().union(*chosen), pairs.pairs)


def held_out_conditions(
    held_out: HeldOut, shown: Iterable[Labels], keep: Iterable[Labels], seed: int
) -> dict[str, list[list[str]]]:
    """Conditions to test with: what is held out, and as many sets that training shows.

    Args:
        shown: label sets of the training pictures.
        keep: the conditions of test.json and new_test.json, which are not taken again.

    Returns:
        `seen` and `unseen`, with as many sets of each size, if sets are held out: where more are
        than are shown, some of them are in neither, and where none is shown, all are `unseen`.
        `unseen_pairs` if pairs are: each by itself and with THIRD_OBJECTS others.
    """
    rng = np.random.default_rng([seed, 0, 4])
    shown, objects = set(shown) - set(keep), sorted(frozenset().union(*shown))
    result = {}

    def shuffled(candidates: Iterable[Labels]) -> list[list[str]]:
        ordered = sorted(sorted(labels) for labels in candidates)
        return [ordered[n] for n in rng.permutation(len(ordered))]

    if held_out.sets:
        seen, unseen = [], []
        for size in SIZES:
            ours, theirs = (
                shuffled(s for s in sets if len(s) == size) for sets in (held_out.sets, shown)
            )
            number = min(len(ours), len(theirs))
            seen, unseen = seen + theirs[:number], unseen + ours[:number]
        result["unseen"] = unseen or sorted(shuffled(held_out.sets), key=len)
        if seen:
            result["seen"] = seen
    if held_out.pairs:
        pairs, more = shuffled(held_out.pairs), []
        for pair in pairs:
            others = rng.permutation([name for name in objects if name not in pair]).tolist()
            more += [[*pair, other] for other in others[:THIRD_OBJECTS]]
        result["unseen_pairs"] = pairs + more
    return result
