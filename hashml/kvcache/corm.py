"""CORM: cache optimisation with recent messages (Dai, Huang, Jiang, Chen, Cai, Bi, Shi, 2024, arXiv 2404.15949).

Adjacent queries are alike, so what the current one needs is what a few recent ones needed. A key is minor to a query
that sees ``n`` keys if it gets less than ``1 / n``, and long-term minor if it was minor to each of the last
``queries`` (w). After every step every long-term minor key is dropped, but for the ``window`` of recent ones:

    keep[j] = any of the last w votes for j,  or fewer than w queries have seen j,  or j in the window

There is no budget: how many stay follows the head's attention. Slots are allocated all the same, so when they are
full those with the fewest votes leave, the older first. ``budgeted`` drops nothing before that, for comparisons with
methods of fixed size. The prompt's last w queries vote on all of it, and its minor keys leave at the first step. A
key stays if any of the query heads votes for it; ``votes = "mean"`` lets their mean decide. The paper's own w is not
known for certain (256 is recalled), nor how it treats keys that fewer than w queries saw: here they stay.
"""

import dataclasses

from jaxtyping import Array

from hashml.kvcache.contract import PolicyState
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.window_vote import WindowVote, count_queries, count_votes


@dataclasses.dataclass(frozen=True)
class Corm(WindowVote):
    """Drops the keys that none of the last queries voted for.

    Attributes:
        queries, votes: as in `WindowVote`.
        budgeted: whether only a full store drops keys.
    """

    queries: int = 256
    budgeted: bool = False

    def expire(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array) -> Array | None:
        return None if self.budgeted else self._long_term_minor(state)

    def admit(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array) -> Array | None:
        return None if self.budgeted else ~self._long_term_minor(state)

    def _long_term_minor(self, state: PolicyState) -> Array:
        return (count_queries(state, self.queries) == self.queries) & (count_votes(state) == 0)
