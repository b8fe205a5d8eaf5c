"""Diverse beam search (arXiv:1610.02424), as transformers 4.45 counts it: groups of beams that shun one another's tokens.

Axis letters: B rows of the prompt, G groups, M beams of a group, C candidates, V vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxmodels.generation.beam import LOW, Beams, BeamSearch, Hypotheses
from jaxmodels.generation.processors import kind
from jaxmodels.generation.processors_tokens import HammingDiversity
from jaxmodels.generation.sampling import State, record


@struct.dataclass
class OlderBeamSearch(BeamSearch):
    """BeamSearch with the accounts of transformers 4: a row is done when its finished hypotheses cannot be beaten by its best candidate,
    one that ends included; the running hypotheses are finished at the last step, where the row is not done by then."""

    kind: str = kind("OlderBeamSearch")

    def _settle(self, beams: Beams, found: Hypotheses, ends: jax.Array, new: jax.Array) -> Beams:
        n = beams.running.scores.shape[1]
        running, progress = self._go_on(beams, found, ends, new)
        ending = ends & (jnp.arange(ends.shape[1]) < n) & self._may_end(beams, found, new)
        finished = self._add(beams.finished, found, ending & beams.improvable, new + 1)
        beaten = self.early_stopping != 1
        beaten &= self._improvable(found, finished, new + 1)
        improvable = beams.improvable & (beaten | ~finished.there.all(1, keepdims=True))
        last = new + 1 >= self.max_new_tokens
        left = self._ready(running, progress) & ~running.there
        finished = self._add(finished, running, left & last & improvable, new + 1)
        return Beams(running, finished, improvable, improvable.any() & ~last, progress)

    def _go_on(self, beams: Beams, found: Hypotheses, ends: jax.Array, new: jax.Array) -> tuple[Hypotheses, Any]:
        """The hypotheses that the next step continues, `there` if they end all the same, and their progress."""
        order = jnp.where(ends, LOW, jnp.maximum(found.scores, LOW / 2))  # what a processor forbids comes before what ends
        places = lax.top_k(order, beams.running.scores.shape[1])[1]
        return dataclasses.replace(found, scores=found.scores + ends * LOW, there=ends).take(places), None

    def _may_end(self, beams: Beams, found: Hypotheses, new: jax.Array) -> Any:
        """Which candidates [B,C] may end, those that do."""
        return True

    def _ready(self, running: Hypotheses, progress: Any) -> Any:
        """Which running hypotheses [B,M] may end at the last step."""
        return jnp.ones(running.scores.shape, bool)

    def _add(self, finished: Hypotheses, others: Hypotheses, which: jax.Array, length: jax.Array) -> Hypotheses:
        """The best of the finished hypotheses [B,M] and of those of `others` [B,C] where `which` [B,C]. One with a token that a processor
        forbids is better than none."""
        scores = others.scores / length.astype(jnp.float32) ** self.length_penalty
        scores = jnp.where(which, jnp.maximum(scores, LOW / 2), LOW)
        return finished.join(dataclasses.replace(others, scores=scores, there=which)).best(finished.scores.shape[1])


@struct.dataclass
class DiverseBeamSearch(OlderBeamSearch):
    """`groups` beam searches side by side, of copies / groups beams each: the later ones pay diversity_penalty for every time that an
    earlier one has chosen a token in the same step (the processor HammingDiversity)."""

    groups: int = struct.field(pytree_node=False, default=1)
    kind: str = kind("DiverseBeamSearch")

    def _begin(self, B: int, M: int, state: State) -> Beams:
        return super()._begin(B * self.groups, M // self.groups, state)

    def _choose(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        G, new, (R, V) = self.groups, state.sequences.new, logits.shape
        B, M = R // self.copies, self.copies // G
        log_p = jax.nn.log_softmax(logits)
        apart = lambda x: x.reshape(B, G, *x.shape[1:]) if x.ndim else x
        beams, used = jax.tree.map(apart, state.extra), jnp.zeros((B, V), jnp.float32)
        scores, groups = jnp.zeros_like(log_p), []
        for g in range(G):
            first = jnp.arange(B) * self.copies + g * M
            rows = (first[:, None] + jnp.arange(M)).reshape(-1)
            mine = dataclasses.replace(state, sequences=state.sequences.take(rows))
            penalty = jnp.repeat(used, M, 0)
            processors = tuple(dataclasses.replace(p, used=penalty) if isinstance(p, HammingDiversity) else p for p in self.processors)
            processed = mine.process(processors, log_p[rows])
            before = jax.tree.map(lambda x, g=g: x[:, g] if x.ndim else x, beams)
            found, ends = self._candidates(state, before, processed, first)
            after = self._settle(before, found, ends, new)
            chosen = jnp.where(before.improvable, after.running.tokens[:, :, new], self.pad_token_id)
            used = used.at[jnp.arange(B)[:, None], chosen].add(1)
            scores = scores.at[rows].set(processed)
            groups.append(after)
        together = lambda *xs: jnp.stack(xs, 1).reshape(-1, *xs[0].shape[1:]) if xs[0].ndim else jnp.stack(xs).any()
        after = jax.tree.map(together, *groups)
        rows, tokens = (x[:, :, new].reshape(-1) for x in (after.running.beams, after.running.tokens))
        state = dataclasses.replace(
            state,
            sequences=state.sequences.take(rows).append(tokens, jnp.ones(R, bool)),
            scores=record(state.scores, scores, new),
            logits=record(state.logits, logits, new),
            extra=after,
        )
        return state, rows
