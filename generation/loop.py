"""`generate`: one prefill and one `lax.while_loop`, two programs for each (model, options' structure, batch, buckets).

Prompts are left-padded into a bucket; positions, not columns, decide what a token sees, so a bucket changes no number. Lengths and
the options' values are traced. A chunk of the loop is the same program with a smaller limit: streaming compiles nothing of its own.

Axis letters: B rows, R sequences per row, T prompt tokens, P the prompt's bucket, S cache slots, W = S + 1 columns, N new tokens,
V vocabulary."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxmodels.cache import Cache, init_cache
from jaxmodels.generation.assistants import ROUNDS, build_drafter, build_reencoder, recall
from jaxmodels.generation.assisted import Assistance, Assisted, Progress
from jaxmodels.generation.beam import BeamSearch
from jaxmodels.generation.compilation_cache import enable_compilation_cache
from jaxmodels.generation.config import GenerationConfig
from jaxmodels.generation.grammar import Grammar, GrammarMask
from jaxmodels.generation.guidance import guided, negative_prompt, read_both
from jaxmodels.generation.healing import heal_tokens
from jaxmodels.generation.host import caller
from jaxmodels.generation.inputs import bucket, concrete, digest, eos_ids, kept_as, new_tokens, read_prompt, within_positions
from jaxmodels.generation.prefill import in_chunks
from jaxmodels.generation.processors import Sequences, build_processors
from jaxmodels.generation.recompute import recomputes, reread, transcript
from jaxmodels.generation.sampling import Forward, Result, State, Strategy, reader
from jaxmodels.generation.seq2seq import decoder_prompt
from jaxmodels.generation.states import check_states, read_states
from jaxmodels.generation.stopping import StopStrings
from jaxmodels.generation.strategies import build_strategy, check, contrastive
from jaxmodels.generation.turn_cache import TurnCache, before_beams, columns, conditional, takes_back, turn
from jaxmodels.generation.universal import Reencoder
from jaxmodels.outputs import ModelOutput
from jaxmodels.sharding.processes import agree, from_first, spans, telling, to_host

SMOOTH = 0.05  # seconds: chunks of a stream grow while they take less


@struct.dataclass
class GenerateOutput(ModelOutput):
    """sequences [B*R, T+N] int32: input_ids as given and the new tokens, pad_token_id after a row's end. `scores` and `logits`
    [N, B*R, V] float32, processed and raw, when output_scores or output_logits; indexed by step as HF's tuples are. `cache`: for the
    next turn; None with use_cache=False. `lengths` [B*R] int32: new tokens of each row, its end-of-sequence token included.
    `sequences_scores` [B*R] float32 and `beam_indices` [B*R,N] int32, -1 after a row's end: of beams. `assistance`: how drafts did, of
    assisted decoding. States and attentions: see read_states."""

    sequences: Any
    scores: Any = None
    logits: Any = None
    cache: TurnCache | None = None
    lengths: Any = None
    sequences_scores: Any = None
    beam_indices: Any = None
    assistance: Assistance | None = None
    hidden_states: Any = None
    attentions: Any = None
    decoder_hidden_states: Any = None
    decoder_attentions: Any = None
    cross_attentions: Any = None
    encoder_hidden_states: Any = None
    encoder_attentions: Any = None

    def with_states(self, model: Any, params: Any, real: Any, size: int, states: bool, weights: bool, source: Any) -> GenerateOutput:
        """With the fields that read_states gives; `real` [B,T] of the prompt, `size` a bucket for all columns, `source` see there."""
        new = self.sequences.shape[1] - real.shape[1]
        xp: Any = jnp if isinstance(self.lengths, jax.core.Tracer) else np
        real = xp.repeat(xp.asarray(real), len(self.sequences) // len(real), 0)
        real = xp.concatenate([real, np.arange(new) < self.lengths[:, None]], 1)
        found = read_states(model, params, self.sequences, real, new, size, states, weights, source)
        return self.replace(**found)  # type: ignore[attr-defined]

    @property
    def past_key_values(self) -> TurnCache | None:
        return self.cache


@struct.dataclass
class Report:
    """What the host wants to know after a program; no part of the state, whose buffers the next program takes over."""

    result: Result
    steps: jax.Array
    done: jax.Array


def generate(
    model: Any,
    params: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    *,
    key: jax.Array | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: Any = None,
    cache: Cache | None = None,
    decoder_input_ids: Any = None,
    decoder_attention_mask: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Any = None,
    mask_fn: Any = None,
    negative_prompt_ids: Any = None,
    negative_prompt_attention_mask: Any = None,
    tokenizer: Any = None,
    grammar: Grammar | None = None,
    assistant_model: tuple[Any, Any] | None = None,
    assistant_tokenizer: Any = None,
    **overrides: Any,
) -> GenerateOutput:
    """Continue input_ids [B,T]: HF's `generate`, greedy or, with do_sample=True, sampling.

    attention_mask [B,T]: 1 for real tokens, anywhere in a row; without it pad_token_id counts as padding as in HF. key: from
    jax.random.key, needed for sampling. generation_config and overrides: options by HF's names. streamer: an object with
    `put(tokens)` and `end()`. cache: an earlier result's, with the conversation so far; input_ids are then only what follows the
    answer, perhaps nothing ([B,0]). Penalties and max_length count the tokens of this call. A cache is not used up.

    logits_processor, stopping_criteria: lists of processors and followers of this package, or of functions as HF's, on numpy arrays:
    `(input_ids [B,T], scores [B,V]) -> scores` and `(input_ids, None) -> bool [B]`. prefix_allowed_tokens_fn: `(batch_id, input_ids [T])
    -> ids`; mask_fn: `(input_ids [B,T]) -> allowed [B,V]`. Another function compiles nothing. negative_prompt_ids [B,T']: what
    guidance_scale leads away from, without it the prompt's last token. tokenizer: for stop_strings and token_healing. grammar: what the
    generated text of every row must be; see Grammar. assistant_model: (model, params) that drafts tokens for this one to check, with
    tokenizer and assistant_tokenizer where the two have different ones. output_hidden_states and output_attentions are of the returned
    sequences, and read after the loop; see read_states.

    Of an encoder-decoder model input_ids and attention_mask are the encoder's, read once; the sequences are the decoder's. They begin with
    decoder_start_token_id, perhaps followed by decoder_input_ids [B,T]. With a cache, which holds what the encoder read, input_ids is None.

    Over a mesh with devices of several processes, each makes the same call with the whole batch, and gets the whole result.

    Under jax.jit the model, max_new_tokens and do_sample are static, and sequences always have max_new_tokens new columns.

    Raises ValueError for unknown or bad options and bad input, before anything is compiled."""
    given = jax.tree.leaves((params, input_ids, attention_mask, key))
    together = spans(model.rules) and not any(isinstance(x, jax.core.Tracer) for x in given)
    with telling("generate", together):
        if not isinstance(generation_config, GenerationConfig | None):
            found = f"{type(generation_config).__module__}.{type(generation_config).__name__}"
            raise ValueError(f"generation_config is a {found}; make a jaxmodels.GenerationConfig of it, with from_dict(a dictionary)")
        config = (generation_config or GenerationConfig()).replace(**overrides).filled(model.config)
        if config.do_sample and not hasattr(key, "dtype"):
            raise ValueError(f"do_sample=True draws from a PRNG key; found key={key!r}. Pass key=jax.random.key(0), or another seed")
        check(config, model.config, streamer)
        drafter = build_drafter(config, model, params, assistant_model, (tokenizer, assistant_tokenizer), cache)
        if config.output_hidden_states or config.output_attentions:
            check_states(cache)
        kept = kept_as(config, cache)
        if config.token_healing:
            again = partial(generate, model, params, do_sample=False, num_beams=1, token_healing=False)
            input_ids, attention_mask = heal_tokens(again, concrete(input_ids, "token_healing"), tokenizer, cache)
        source = None
        if model.config.is_encoder_decoder:
            if cache is None:
                source = read_prompt(input_ids, attention_mask, config, model.config.vocab_size, None)
            input_ids, attention_mask = decoder_prompt(config, input_ids, decoder_input_ids, decoder_attention_mask, cache)
        ids, real = read_prompt(input_ids, attention_mask, config, model.config.vocab_size, cache)
        traced = any(isinstance(x, jax.core.Tracer) for x in (ids, *(source or ())))
        T = ids.shape[1]
        limit = within_positions(config, new_tokens(config, T, model.config), real, cache, model.config)
        if together:
            drawn = digest(to_host(jax.random.key_data(key))) if config.do_sample else None  # type: ignore[arg-type]  # checked
            prompts = {"input_ids and attention_mask (hash)": digest(ids, real), "of the encoder (hash)": digest(*(source or ()))}
            agree("generate", **prompts, **{"key (hash)": drawn}, streamer=streamer is not None, **config.to_dict())
        deadline = None if config.max_time is None else time.perf_counter() + config.max_time
        if traced and deadline is not None:
            raise ValueError("max_time is watched from the host: it cannot be used inside jax.jit")
        beams: int = config.num_beams  # type: ignore[assignment]  # filled
        negative = None
        if config.guidance_scale not in (None, 1.0):
            negative = negative_prompt(ids, real, negative_prompt_ids, negative_prompt_attention_mask, model.config.vocab_size, cache)
        criteria = stopping_criteria
        if deadline is not None and beams > 1:
            criteria = [*(criteria or ()), lambda ids, scores: time.perf_counter() > deadline]
        group: int = beams // config.num_beam_groups  # type: ignore[operator]  # filled
        called = partial(caller, logits_processor, criteria, prefix_allowed_tokens_fn, mask_fn, group, traced)
        stops = () if config.stop_strings is None else (StopStrings.of(tokenizer, config.stop_strings, model.config.vocab_size),)
        if grammar is not None:
            stops = (grammar, *stops)
    enable_compilation_cache()

    if isinstance(cache, TurnCache):
        cache = cache.replace(memory=recall(drafter, cache.memory))
    unread = columns(cache.unread).shape[1] if isinstance(cache, TurnCache) else 0
    P = bucket(max(T + unread, 0 if negative is None else negative[0].shape[1]))
    chunk = config.prefill_chunk_size
    chunk = None if chunk is None or chunk >= P else chunk
    P = P if chunk is None else -(-P // chunk) * chunk
    used = 0 if cache is None else cache.slots if isinstance(cache.index, jax.core.Tracer) else int(cache.index)
    steps = limit - (not contrastive(config))  # after the prompt's own
    room = 0 if drafter is None else ROUNDS * drafter.columns
    slots = max(bucket(used + P + steps + room), 0 if cache is None else cache.slots, config.max_cache_len or 0)
    widen = lambda x, size=P - unread: (jnp if isinstance(x, jax.core.Tracer) else np).pad(x, ((0, 0), (size - x.shape[1], 0)))
    ids_wide, real_wide = widen(ids), widen(real)
    width = 0 if source is None else source[0].shape[1]
    source = None if source is None else tuple(widen(x, bucket(width)) for x in source)
    eos = eos_ids(config.eos_token_id)
    pad = config.pad_token_id if config.pad_token_id is not None else max(int(eos[0]), 0)
    record = (bool(config.output_scores), bool(config.output_logits))
    if streamer is not None:
        streamer.put(np.repeat(concrete(ids, "a streamer"), config.num_return_sequences, 0))  # type: ignore[arg-type]  # filled
    with called() as own:
        processors = build_processors(
            config, eos, prompt_length=T, new_tokens=limit, encoder=source or (ids_wide, real_wide), custom=own.custom,
            allowed=own.allowed if grammar is None else (GrammarMask(eos), *own.allowed), vocab_size=model.config.vocab_size,
        )  # fmt: skip
        strategy = build_strategy(config, model.config, processors, eos, pad, key, limit, bucket(limit), drafter)
        decode = partial(_decode, model, params, strategy)
        state, report = _prefill(
            model, params, strategy, ids_wide, real_wide, source, cache, np.int32(T),
            None if negative is None else tuple(map(widen, negative)), (*stops, *own.followers),
            slots=slots, steps=bucket(limit) if any(record) else 0, record=record, kept=kept, chunk=chunk,
        )  # fmt: skip
        reencode = None
        if assistant_tokenizer is not None:
            reencode = build_reencoder(config, assistant_model, (tokenizer, assistant_tokenizer), ids, real, strategy)  # type: ignore[arg-type]
        if streamer is not None or reencode is not None or (deadline is not None and beams == 1):
            state, report = _chunks(decode, state, report, limit, streamer, deadline, reencode)
        elif steps:
            state, report = decode(state, np.int32(limit))
        output = _output(ids, state, report, limit, pad)
    if not (config.output_hidden_states or config.output_attentions):
        return output
    states, weights = bool(config.output_hidden_states), bool(config.output_attentions)
    read = None if source is None else (*source, width)
    return output.with_states(model, params, real, bucket(T + limit - 1), states, weights, read)


def _forward(model: Any, params: Any, strategy: Strategy, source: Any = None, logits_to_keep: int = 1) -> Forward:
    read, more = reader(model, params, source), {"output_hidden_states": True} if strategy.hidden_states else {}

    def forward(tokens: jax.Array, real: jax.Array, cache: Cache) -> tuple[Any, Cache]:
        if recomputes(cache):
            out, cache = reread(model, params, cache, tokens, real, logits_to_keep=1, **more)
            return strategy.look(model, params, out), cache
        out = read(tokens, real, cache, logits_to_keep=logits_to_keep, **more)
        return strategy.look(model, params, out), out.cache

    return guided(forward)


@partial(jax.jit, static_argnames=("model", "slots", "steps", "record", "kept", "chunk"))
def _prefill(
    model: Any, params: Any, strategy: Strategy, ids: jax.Array, real: jax.Array, source: Any, cache: Cache | None, length: jax.Array,
    negative: tuple[jax.Array, jax.Array] | None, followers: tuple[Any, ...], *, slots: int, steps: int, record: tuple[bool, bool],
    kept: Any, chunk: int | None,
) -> tuple[State, Report]:  # fmt: skip
    """Read the prompt [B,P], beside it a negative one, once and choose the first tokens of its copies. `kept`: see _kept; `chunk`: see
    in_chunks."""
    memory = None
    if isinstance(cache, TurnCache):
        ids = jnp.concatenate([columns(cache.token), ids], 1)
        real = jnp.concatenate([columns(cache.unread), real], 1)
        memory, cache = cache.memory, cache.plain()
    ids, real = _to_the_right(ids, real)
    (B, P), W, copies = ids.shape, slots + 1, strategy.copies
    forward = in_chunks(_forward(model, params, strategy, source), _forward(model, params, strategy), chunk)
    empty = lambda rows: transcript(rows, slots, source) if kept is False else init_cache(model, rows, slots, implementation=kept)
    if negative is None:
        seen, cache = forward(ids, real, empty(B) if cache is None else cache.resize(slots))
    else:
        seen, cache = read_both(forward, (ids, real), _to_the_right(*negative), empty(2 * B))
    prompt = None
    if isinstance(strategy, BeamSearch):
        prompt = tuple(None if takes_back(layer) else layer for layer in conditional(cache).layers)
    if copies > 1:
        rows = jnp.repeat(jnp.arange(B), copies)
        seen, ids, real = jax.tree.map(lambda x: x[rows], (seen, ids, real))
        cache = cache.take(rows)
    wide = lambda x: jnp.pad(x, ((0, 0), (0, W - P)))
    sequences = Sequences(wide(ids), wide(real), jnp.int32(P), length, jnp.int32(0)).follow(followers)
    scores, logits = (jnp.zeros((steps, *jax.tree.leaves(seen)[0].shape), jnp.float32) if wanted else None for wanted in record)
    extra = strategy.drafter.begin(ids, real, source, memory, slots, chunk) if isinstance(strategy, Assisted) else None
    state = strategy.start(State(sequences, cache, jnp.zeros(B * copies, bool), scores, logits, extra, prompt), seen)
    return state, _report(strategy, state)


def _to_the_right(ids: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Padding to the left, wherever it was."""
    order = jnp.argsort(real, axis=1, stable=True)
    return jnp.take_along_axis(ids, order, 1), jnp.take_along_axis(real, order, 1)


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def _decode(model: Any, params: Any, strategy: Strategy, state: State, limit: jax.Array) -> tuple[State, Report]:
    """Steps until there are `limit` new tokens or nothing is left to do."""
    going = lambda state: (state.steps < limit) & ~strategy.done(state)
    state = lax.while_loop(going, partial(strategy.step, _forward(model, params, strategy, logits_to_keep=0)), state)
    return state, _report(strategy, state)


def _report(strategy: Strategy, state: State) -> Report:
    return Report(strategy.result(state), state.steps, strategy.done(state))


def _chunks(
    decode: Any, state: State, report: Report, limit: int, streamer: Any, deadline: float | None, reencode: Reencoder | None
) -> tuple[State, Report]:
    """The loop in chunks, until the deadline of time.perf_counter; a chunk runs while the streamer handles the one before. With a
    reencoder a chunk is a round."""
    sent, chunk, began = 0, 1, time.perf_counter()
    try:
        while True:
            result, new, done = to_host((report.result, report.steps, report.done))
            now = time.perf_counter()
            left = math.inf if deadline is None else deadline - now
            took, going = now - began, not done and new < limit and left > 0
            chunk = chunk * 2 if took < SMOOTH and 2 * took < left else max(chunk // 2, 1)
            if not report.done.is_fully_addressable:  # several processes: one clock decides
                going, chunk = map(int, from_first("generate", f"{int(going)} {chunk}").split())
            if going:
                began = now
                if reencode is not None:
                    chunk, state = 1, reencode(state, result, limit)
                state, report = decode(state, np.int32(min(new + chunk, limit)))
            for column in () if streamer is None else range(sent, new):
                streamer.put(result.tokens[:, result.first + column])
            if not going:
                return state, report
            sent = new
    finally:
        if streamer is not None:
            streamer.end()


def _output(ids: Any, state: State, report: Report, limit: int, pad: int) -> GenerateOutput:
    xp: Any
    last = report.result.last
    kept: Any = conditional(state.cache)
    rows = len(last[0])
    if recomputes(kept):
        kept = None
    elif last[0].ndim == 2:
        kept = before_beams(state, len(ids), rows)
    elif len(kept.positions) > rows:
        kept = kept.take(jnp.arange(0, len(kept.positions), len(kept.positions) // rows))
    memory = state.extra.memory if isinstance(state.extra, Progress) else None
    cache = None if kept is None else turn(kept, *last, memory)
    if isinstance(report.steps, jax.core.Tracer):
        xp, result, n, steps, records = jnp, report.result, limit, limit, (state.scores, state.logits)
    else:
        xp = np  # slices of another length would each compile a program
        result, steps, records = to_host((report.result, report.steps, (state.scores, state.logits)))
        n, steps = result.new, max(steps, result.new)
    columns = result.first + np.arange(n)
    tokens = xp.where(np.arange(n) < result.new, result.tokens.take(columns, 1), pad)
    lengths = result.real.take(columns, 1).sum(1, dtype=np.int32)
    ids = xp.repeat(xp.asarray(ids), len(tokens) // len(ids), 0)
    scores, logits = (None if record is None else record[:steps] for record in records)
    beams = None if result.beam_indices is None else result.beam_indices[:, :n]
    return GenerateOutput(
        xp.concatenate([ids, tokens], 1), scores, logits, cache, lengths, result.sequences_scores, beams, result.assistance
    )
