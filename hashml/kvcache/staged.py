"""Two policies in sequence: one chooses what a prompt leaves, another what goes from then on.

SnapKV knows what the prompt's last queries want and nothing of later ones, and H2O sums up all that ever asked. After

    scores of prompt tokens   those of ``prompt``
    state of what is kept     that of ``decode``, as if it had read the prompt

every step is ``decode``'s, the prompt's tokens and later ones alike. With the same policy in both places, and in a
prompt that fits, it is ``decode`` alone; in a cache that only ever sees a prompt it is ``prompt`` alone.
"""

import dataclasses

from jaxtyping import Array

from hashml.kvcache.contract import Attention, HeadBudgets, Policy, PolicyState, PrefillStatistics, Queries
from hashml.kvcache.spec import LayerSpec


@dataclasses.dataclass(frozen=True)
class Staged(Policy):
    """The one policy for the prompt, the other for every step after it.

    Attributes:
        prompt: whose scores choose among a prompt's tokens.
        decode: whose state, scores and expiry hold from then on.

    Raises:
        ValueError: for a policy of two stages, or with budgets of heads, inside; for a ``decode`` that decides for
            all heads alike after a ``prompt`` that does not; where both read column sums of different softmaxes.
    """

    prompt: Policy
    decode: Policy

    def __post_init__(self) -> None:
        for name in ("prompt", "decode"):
            policy = getattr(self, name)
            if isinstance(policy, Staged | HeadBudgets):
                raise ValueError(f"{name} is {policy}; it must be a policy of one stage, without budgets of heads")
        if self.decode.head_uniform and not self.prompt.head_uniform:
            raise ValueError(f"decode is {self.decode}, which decides for all heads alike; so must prompt, and "
                             f"{self.prompt} does not")  # fmt: skip
        both = self.prompt.sums_columns and self.decode.sums_columns
        if both and _softmax(self.prompt) != _softmax(self.decode):
            raise ValueError(f"prompt is {self.prompt} and decode {self.decode}; both read the prompt's column sums, "
                             f"each of its own softmax, and there is one")  # fmt: skip

    @property
    def head_uniform(self) -> bool:
        return self.decode.head_uniform

    @property
    def observed(self) -> int:
        return max(self.prompt.observed, self.decode.observed)

    @property
    def sums_columns(self) -> bool:
        return self.prompt.sums_columns or self.decode.sums_columns

    def check(self, spec: LayerSpec) -> None:
        self.prompt.check(spec)
        self.decode.check(spec)

    def init(self, spec: LayerSpec, batch: int) -> PolicyState:
        return self.decode.init(spec, batch)

    def weigh(self, logits: Array, valid: Array, pos: Array, queries: Queries) -> Array:
        one = self.prompt if self.prompt.sums_columns else self.decode
        return one.weigh(logits, valid, pos, queries)

    def resized(self, slots: int, of: int) -> "Staged":
        return Staged(self.prompt.resized(slots, of), self.decode.resized(slots, of))

    def enter(self, spec: LayerSpec, keys: Array) -> PolicyState | None:
        return self.decode.enter(spec, keys)

    def from_prefill(self, spec: LayerSpec, statistics: PrefillStatistics, key: Array) -> tuple[Array, PolicyState]:
        scores, _ = self.prompt.from_prefill(spec, _seen_by(self.prompt, statistics), key)
        _, state = self.decode.from_prefill(spec, _seen_by(self.decode, statistics), key)
        return scores, state

    def observe(
        self, spec: LayerSpec, state: PolicyState, attention: Attention, pos: Array, queries: Queries
    ) -> PolicyState:
        return self.decode.observe(spec, state, attention, pos, queries)

    def score(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array, key: Array | None = None) -> Array:
        return self.decode.score(spec, state, pos, now, key)

    def expire(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array) -> Array | None:
        return self.decode.expire(spec, state, pos, now)

    def admit(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array) -> Array | None:
        return self.decode.admit(spec, state, pos, now)

    def bulk(self, spec: LayerSpec) -> int:
        return self.decode.bulk(spec)


def _softmax(policy: Policy) -> Policy | None:
    """What tells one policy's softmax from another's: None, or the policy that has its own."""
    return None if type(policy).weigh is Policy.weigh else policy


def _seen_by(policy: Policy, statistics: PrefillStatistics) -> PrefillStatistics:
    """The statistics that a policy asks for: as many of the last queries as it observes, and no more."""
    last = statistics.last
    if last is None or not policy.observed:
        return statistics._replace(last=None)
    return statistics._replace(last=Attention(*(x[..., -policy.observed :, :] for x in last)))
