"""Where drafts come from: the prompt, a smaller model, the model's own first layers, or the host.

Axis letters: B rows, K drafts, T = K + 1 columns that are checked, P the prompt's bucket, W columns of tokens, V vocabulary."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxmodels.cache import Cache, init_cache
from jaxmodels.generation.assisted import DRAFTS, Assisted, Drafts, Memory, Progress, settle
from jaxmodels.generation.prefill import in_chunks
from jaxmodels.generation.processors_base import kind
from jaxmodels.generation.sampling import State, argmax, reader


def progress(num: Any, rows: int, memory: Memory | None = None, given: Drafts | None = None) -> Progress:
    """Where B = `rows` rows begin, each to draft `num`, [] or [B]."""
    none = jnp.zeros(rows, jnp.int32)
    return Progress(memory, jnp.full(rows, num, jnp.int32), given, jnp.int32(0), none, none)


def count(extra: Progress, kept: jax.Array, drafts: Drafts, **changes: Any) -> Progress:
    """The progress after a round that kept [B] tokens, one of them no draft."""
    accepted = jnp.minimum(jnp.maximum(kept - 1, 0), drafts.counts)
    return dataclasses.replace(
        extra, rounds=extra.rounds + 1, drafted=extra.drafted + drafts.counts, accepted=extra.accepted + accepted, **changes
    )


def scheduled(num: jax.Array, kept: jax.Array, drafts: Drafts, most: int) -> jax.Array:
    """HF's heuristic: two more drafts [B] after a round in which all were right, else one less."""
    changed = jnp.where(kept - 1 == drafts.counts, num + 2, jnp.maximum(num - 1, 1))
    return jnp.where(kept > 0, jnp.minimum(changed, most), num)


@struct.dataclass
class PromptLookup:
    """What followed the first place in a row's tokens where its newest ones stand, `ngram` of them or else fewer; `num` drafts.

    transformers also passes over drafts that a processor forbids; here the check does."""

    num: Any
    ngram: Any
    columns: int = struct.field(pytree_node=False)
    kind: str = kind("PromptLookup")

    def begin(self, ids: jax.Array, real: jax.Array, source: Any, memory: Any, slots: int, chunk: int | None) -> Progress:
        return progress(self.num, len(ids))

    def propose(self, assisted: Assisted, state: State, live: jax.Array) -> tuple[Drafts, State]:
        s, K = state.sequences, self.columns - 1
        W = s.tokens.shape[1]
        ids = jnp.where(s.real, s.tokens, -1)

        def narrow(back: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            """matches and sizes [B,W]: the tokens before a column agree with the newest, and how many do."""
            matches, sizes = found
            before = jnp.where(jnp.arange(W) >= back, jnp.roll(ids, back, 1), -1)
            newest = lax.dynamic_slice_in_dim(ids, W - 1 - back, 1, 1)
            matches = matches & (before == newest) & (newest >= 0)
            return matches, sizes + matches

        earlier = jnp.broadcast_to(jnp.arange(W) < W - 1, ids.shape)
        _, sizes = lax.fori_loop(0, jnp.minimum(self.ngram, W), narrow, (earlier, jnp.zeros(ids.shape, jnp.int32)))
        at = sizes.argmax(1).astype(jnp.int32) + 1  # the first of the longest
        left = jnp.minimum(W - at, assisted.room(state))
        counts = jnp.where(live & (sizes.max(1) > 0), jnp.clip(left, 0, self.num), 0)
        tokens = jnp.take_along_axis(s.tokens, jnp.minimum(at[:, None] + jnp.arange(K), W - 1), 1)
        return Drafts(tokens, counts), state

    def settle(self, extra: Progress, tokens: jax.Array, kept: jax.Array, drafts: Drafts) -> Progress:
        return count(extra, kept, drafts)


@struct.dataclass
class DraftModel:
    """Up to `num` tokens of a model's own decoding, by the same processors, fewer after one with a probability below `threshold`.

    `shared`: the model is the first layers of that which checks, and writes into its cache. Otherwise it has a cache of its own, which
    reads what the other one reads. `heuristic`: see `scheduled`. `logits`: whether those of the drafts are wanted."""

    params: Any
    num: Any
    threshold: Any
    model: Any = struct.field(pytree_node=False)
    columns: int = struct.field(pytree_node=False)
    shared: bool = struct.field(pytree_node=False)
    heuristic: bool = struct.field(pytree_node=False)
    logits: bool = struct.field(pytree_node=False)
    kind: str = kind("DraftModel")

    def begin(self, ids: jax.Array, real: jax.Array, source: Any, memory: Memory | None, slots: int, chunk: int | None = None) -> Progress:
        if self.shared:
            return progress(self.num, len(ids))
        # compact: the other cache may have been, and `slots` are made for its index
        cache = init_cache(self.model, len(ids), slots) if memory is None else memory.cache.compact().resize(slots)
        cache = in_chunks(partial(self._read, source=source), self._read, chunk)(ids, real, cache)[1]
        return progress(self.num, len(ids), Memory(cache.spare(self.columns), self.model))

    def _read(self, tokens: jax.Array, real: jax.Array, cache: Cache, source: Any = None) -> tuple[jax.Array, Cache]:
        """The newest logits [B,V], where they are numbers: behind the last of learned positions there are none."""
        out = reader(self.model, self.params, source)(tokens, real, cache, logits_to_keep=1)
        logits = out.logits[:, 0].astype(jnp.float32)
        return jnp.where(jnp.isnan(logits), 0, logits), out.cache

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def follow(self, i: jax.Array, sequences: Any, going: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits [B,V] of the next token, number i of a round, and the cache that has read the newest one where `going` [B]."""
        return self._read(sequences.last()[0], going[:, None], cache)

    def propose(self, assisted: Assisted, state: State, live: jax.Array) -> tuple[Drafts, State]:
        s, T = state.sequences, self.columns
        before = state.cache if self.shared else state.extra.memory.cache
        again = self.shared or before.recurrent  # the drafts are read again: the last one need not be
        room = jnp.minimum(state.extra.num, assisted.room(state))
        if self.model.config.learned_positions is not None:
            room = jnp.minimum(room, self.model.config.learned_positions - before.lengths - 1)
        B, budget = len(live), jnp.where(live, jnp.clip(room, 0, T - 1), 0)

        def body(carry: Any) -> Any:
            i, going, budget, counts, sequences, tokens, logits, cache = carry
            seen, cache = self.follow(i, sequences, going, cache)
            scores = dataclasses.replace(state, sequences=sequences).process(assisted.processors, seen)
            token = argmax(scores) if assisted.key is None else assisted.draw(scores, sequences.new, DRAFTS)
            more = going & (counts < budget) & (scores > -jnp.inf).any(-1)
            counts = counts + more
            sure = jnp.take_along_axis(jax.nn.softmax(scores), token[:, None], 1)[:, 0] >= self.threshold
            budget = jnp.where(sure & ~(token[:, None] == assisted.eos_token_id).any(-1), budget, counts)
            tokens = lax.dynamic_update_index_in_dim(tokens, token, i, 1)
            logits = None if logits is None else lax.dynamic_update_index_in_dim(logits, scores, i, 1)
            going = more & (counts < budget) if again else more
            return i + 1, going, budget, counts, sequences.append(token, more), tokens, logits, cache

        none = jnp.zeros((B, T), jnp.int32)
        logits = jnp.zeros((B, T, self.vocab_size), jnp.float32) if self.logits else None
        carry = (jnp.int32(0), live & (budget > 0) if again else live, budget, none[:, 0], s, none, logits, before)
        *_, counts, _, tokens, logits, after = lax.while_loop(lambda carry: carry[1].any(), body, carry)
        drafts = Drafts(tokens[:, :-1], counts, None if logits is None else logits[:, :-1], None if self.shared else after)
        if self.shared and not before.recurrent:
            state = dataclasses.replace(state, cache=after.rewind(before.lengths, before.index))
        return drafts, state

    def settle(self, extra: Progress, tokens: jax.Array, kept: jax.Array, drafts: Drafts) -> Progress:
        num = scheduled(extra.num, kept, drafts, self.columns - 1) if self.heuristic else extra.num
        if self.shared:
            return count(extra, kept, drafts, num=num)
        cache = settle(self._read, extra.memory.cache, drafts.cache, tokens, kept)  # type: ignore[union-attr,arg-type]
        return count(extra, kept, drafts, num=num, memory=Memory(cache, self.model))
