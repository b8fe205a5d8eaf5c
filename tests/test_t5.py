import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processing_fixtures as fixtures
import pytest
import torch
import transformers
from cases import Seq2SeqCase, tensors
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tester import Seq2SeqTester, Seq2SeqVariantTester
from transformers.models.t5.modeling_t5 import T5Attention

from jaxmodels import auto
from jaxmodels.cache import init_cache
from jaxmodels.cli.main import main
from jaxmodels.convert import CheckpointError, parity
from jaxmodels.generation import generate
from jaxmodels.models.t5 import T5Config, T5ForConditionalGeneration
from jaxmodels.ops.relative import distance_buckets
from jaxmodels.params import abstract_params, flatten
from jaxmodels.training.step import create_train_state, make_train_step

SHAPE = {
    "vocab_size": 263,
    "d_model": 48,
    "d_kv": 10,
    "d_ff": 80,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 6,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 90,
    "decoder_start_token_id": 0,
}
ONE_EACH = {"num_layers": 1, "num_decoder_layers": 1}
ONE_ONE = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def all_copies(file):
    """As google-t5's files: the embeddings four times, and a table that nothing reads."""
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    unread = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((12, 6), np.float32)}
    return file | dict.fromkeys(names, file["shared.weight"]) | unread


def without_shared(file):
    return {"encoder.embed_tokens.weight" if key == "shared.weight" else key: x for key, x in file.items()}


class TestT5(Seq2SeqTester):
    hf_config = transformers.T5Config(**SHAPE)
    full_size = ({}, 60_506_624)  # google-t5/t5-small
    other_keys = (all_copies, without_shared)
    way = {"num_beams": 3}  # noqa: RUF012
    own_heads = True

    def head_ids(self, ids):
        """An end-of-sequence token at the end of every cut, nowhere else."""
        ids = np.where(ids == 1, 2, ids)
        ids[:, [30, 49]] = 1
        return ids


class UntiedCase(Seq2SeqCase):
    """transformers 5 unties a head that a file has; a config cannot ask for it."""

    @staticmethod
    def perturbed(hf):
        hf = Seq2SeqCase.perturbed(hf)
        generator = torch.Generator().manual_seed(5)
        hf.lm_head.weight = torch.nn.Parameter(0.15 * torch.randn(hf.lm_head.weight.shape, generator=generator))
        return hf


class TestT5OneOne(Seq2SeqVariantTester):
    hf_config = transformers.T5Config(**SHAPE | {"num_heads": 1, "num_layers": 2, "num_decoder_layers": None}, **ONE_ONE)
    case_class = UntiedCase
    greedy = True

    def test_greedy(self, case):
        assert case.report.greedy and case.report.greedy_equal, str(case.report)

    def test_torch_reads_ours(self, case, tmp_path):
        """The head stays apart and the decoder's output unscaled, by what our config.json says."""
        auto.save_pretrained(tmp_path, *case.loaded)
        theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
        row = {name: torch.tensor(x[None], dtype=torch.long) for name, x in case.inputs.alone(2).items()}
        with torch.no_grad():
            torch.testing.assert_close(theirs(**row).logits, case.hf(**row).logits)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 40).map(lambda n: 4 * n), st.integers(1, 300), st.booleans())
def test_buckets(num, further, causal):
    """Each distance in torch's bucket, edges included."""
    farthest = num // 2 + further
    distance = torch.arange(-2 * farthest, 2 * farthest + 1)
    theirs = T5Attention._relative_position_bucket(distance, not causal, num, farthest)
    ours = distance_buckets(num, farthest, causal)[np.clip(distance.numpy(), -farthest, farthest) + farthest]
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("published", "count"),
    [
        ({"d_ff": 1024, "num_heads": 6, "num_layers": 8, "num_decoder_layers": 8} | ONE_ONE, 76_961_152),  # google/t5-v1_1-small
        ({"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": 12}, 222_903_552),  # google-t5/t5-base
    ],
)
def test_published_sizes(published, count):
    config = auto.AutoConfig.for_model("t5", **published)
    model = T5ForConditionalGeneration(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model))) == count


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    config = transformers.T5Config(**SHAPE | {"num_layers": 2})
    return Seq2SeqCase.make(config, tmp_path_factory.mktemp("t5"), task="AutoModelForSeq2SeqLM")


def rows_of(case):
    return case.inputs.input_ids, case.inputs.attention_mask


def torch_generate(case, **options):
    """Row by row, alone."""
    found = []
    for b in range(4):
        ids = torch.tensor(case.inputs.alone(b)["input_ids"][None], dtype=torch.long)
        with parity._plain_generation(case.hf, 1):
            found.append(case.hf.generate(ids, attention_mask=torch.ones_like(ids), **{"do_sample": False, **options}).numpy())
    return found


def same(ours, theirs):
    """Up to the padding after a row's end."""
    for mine, reference in zip(np.asarray(ours).reshape(len(theirs), -1, ours.shape[-1]), theirs):
        np.testing.assert_array_equal(mine[:, : reference.shape[1]], reference)
        assert (mine[:, reference.shape[1] :] == 0).all()


def test_generate_by_strategy(case):
    """Beams, whose rows share the encoder's keys; penalties of the decoder's and of the encoder's tokens; an end."""
    for options in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"repetition_penalty": 1.7, "encoder_repetition_penalty": 1.4, "eos_token_id": 5, "min_length": 4},
    ):
        result = generate(*case.loaded, *rows_of(case), max_new_tokens=9, **{"eos_token_id": -1, "pad_token_id": 0} | options)
        same(result.sequences, torch_generate(case, max_new_tokens=9, **options))


def test_generate_returns_states(case):
    """HF's five fields for a padded row, in transformers' structure; of two samples of a row the encoder's once."""
    ids, mask = (x[1:3] for x in rows_of(case))
    wanted = {"max_new_tokens": 4, "output_hidden_states": True, "output_attentions": True}
    row = torch.tensor(case.inputs.alone(1)["input_ids"][None], dtype=torch.long)
    real = torch.ones_like(row)
    with parity._plain_generation(case.hf, 1):
        theirs = case.hf.generate(row, attention_mask=real, do_sample=False, return_dict_in_generate=True, **wanted)
    with pytest.warns(UserWarning, match="eager"):
        out = generate(*case.loaded, ids, mask, eos_token_id=-1, **wanted)
    here = mask[0] == 1
    assert not here.all()
    np.testing.assert_array_equal(out.sequences[0], theirs.sequences[0])
    for name in ("decoder_hidden_states", "decoder_attentions", "cross_attentions", "encoder_hidden_states", "encoder_attentions"):
        mine, reference = getattr(out, name), getattr(theirs, name)
        assert len(mine) == len(reference), name
        if name.startswith("encoder"):
            mine, reference = [mine], [reference]
        for steps, others in zip(mine, reference):
            assert len(steps) == len(others), name
            for a, b in zip(steps, others):
                a, b = a[:1], b.detach().numpy()
                if name.startswith("encoder"):
                    a = a[:, here] if a.ndim == 3 else a[..., here, :]
                a = a[..., here] if name in ("cross_attentions", "encoder_attentions") else a
                assert a.shape == b.shape and np.abs(a - b).max() <= 1e-4 * max(1, b.std()), name
    pairs = generate(*case.loaded, ids, mask, num_beams=2, num_return_sequences=2, **wanted | {"output_attentions": False})
    assert len(pairs.encoder_hidden_states[0]) == 2 and len(pairs.decoder_hidden_states[0][0]) == 4
    np.testing.assert_allclose(pairs.encoder_hidden_states[-1], out.encoder_hidden_states[-1], atol=1e-5)


def test_max_length_counts_the_decoders_tokens(case):
    ids, mask = rows_of(case)
    result = generate(*case.loaded, ids, mask, max_length=6, eos_token_id=-1)
    assert result.sequences.shape == (4, 6) and (result.sequences[:, 0] == 0).all() and (result.lengths == 5).all()
    with pytest.warns(UserWarning, match="20 tokens at most"):
        assert generate(*case.loaded, ids[:1], mask[:1], eos_token_id=-1).sequences.shape == (1, 21)


def test_decoder_input_ids(case):
    """The start is put before them where it is missing; a start of one's own, for each row."""
    ids, mask = rows_of(case)
    options = {"max_new_tokens": 5, "eos_token_id": -1}
    read = np.array([[7, 8, 9], [9, 8, 7], [1, 2, 3], [4, 5, 6]], np.int32)
    result = generate(*case.loaded, ids, mask, decoder_input_ids=read, **options)
    for b, (mine, start) in enumerate(zip(result.sequences, read)):
        row = torch.tensor(case.inputs.alone(b)["input_ids"][None], dtype=torch.long)
        with parity._plain_generation(case.hf, 1):
            begun = torch.tensor(start[None], dtype=torch.long)
            theirs = case.hf.generate(row, attention_mask=torch.ones_like(row), decoder_input_ids=begun, max_new_tokens=5, do_sample=False)
        np.testing.assert_array_equal(mine, theirs[0])
    again = generate(*case.loaded, ids, mask, decoder_input_ids=result.sequences[:, :4], **options)
    np.testing.assert_array_equal(again.sequences, result.sequences)
    padded = np.pad(read, ((0, 0), (2, 0)), constant_values=3), np.pad(np.ones_like(read), ((0, 0), (2, 0)))
    masked = generate(*case.loaded, ids, mask, decoder_input_ids=padded[0], decoder_attention_mask=padded[1], **options)
    np.testing.assert_array_equal(masked.sequences[:, -5:], result.sequences[:, -5:])
    own = generate(*case.loaded, ids, mask, decoder_start_token_id=[11, 12, 13, 14], **options)
    np.testing.assert_array_equal(own.sequences[:, 0], [11, 12, 13, 14])


def test_a_turn_goes_on_without_the_encoder(case):
    ids, mask = rows_of(case)
    options = {"eos_token_id": -1, "pad_token_id": 0}
    whole = generate(*case.loaded, ids, mask, max_new_tokens=12, **options)
    begun = generate(*case.loaded, ids, mask, max_new_tokens=5, **options)
    more = generate(*case.loaded, cache=begun.cache, max_new_tokens=7, **options)
    np.testing.assert_array_equal(np.concatenate([begun.sequences, more.sequences], 1), whole.sequences)
    with pytest.raises(ValueError, match="input_ids must be None"):
        generate(*case.loaded, ids, cache=begun.cache, max_new_tokens=7)


def test_under_jit_and_sampled(case):
    ids, mask = rows_of(case)
    model, params = case.loaded
    options = {"max_new_tokens": 12, "eos_token_id": -1, "pad_token_id": 0}
    program = jax.jit(lambda params, ids, mask: generate(model, params, ids, mask, **options).sequences)
    np.testing.assert_array_equal(program(params, ids, mask), generate(model, params, ids, mask, **options).sequences)
    drawn = [
        generate(model, params, ids, mask, do_sample=True, num_return_sequences=3, key=jax.random.key(n), **options) for n in (0, 0, 1)
    ]
    assert drawn[0].sequences.shape == (12, 13)
    assert (drawn[0].sequences == drawn[1].sequences).all() and (drawn[0].sequences != drawn[2].sequences).any()


def test_refusals_of_generate(case):
    ids, mask = rows_of(case)
    model, params = case.loaded
    bare = T5ForConditionalGeneration(model.config.replace(decoder_start_token_id=None, generation_config=FrozenDict()))
    with pytest.raises(ValueError, match="begins with decoder_start_token_id"):
        generate(bare, params, ids, mask, max_new_tokens=3)
    with pytest.raises(ValueError, match="2 ids for 4 rows"):
        generate(model, params, ids, mask, max_new_tokens=3, decoder_start_token_id=[1, 2])
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected \[B,T\] with the 4 rows"):
        generate(model, params, ids, mask, max_new_tokens=3, decoder_input_ids=np.ones((2, 3), np.int32))
    with pytest.raises(ValueError, match="not supported for encoder-decoder"):
        generate(model, params, ids, mask, max_new_tokens=3, guidance_scale=2.0)


def test_cross_attention_is_computed_once(case):
    """The cache's keys are the encoder's however often it is read, and its rows move with it."""
    model, params = case.loaded
    ids, mask = rows_of(case)
    cache, start = init_cache(model, 4, 5), np.zeros((4, 1), np.int32)
    out = case.forward(params, {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": start, "cache": cache})
    after = case.forward(params, {"decoder_input_ids": start + 7, "cache": out.cache.take(np.array([2, 2, 0, 1]))})
    for before, state in zip(out.cache.layers, after.cache.layers):
        np.testing.assert_array_equal(state.cross.k, np.asarray(before.cross.k)[[2, 2, 0, 1]])
        np.testing.assert_array_equal(state.cross.positions.max(1) + 1, mask.sum(1)[[2, 2, 0, 1]])
    assert after.encoder_last_hidden_state is None
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model.apply({"params": params}, decoder_input_ids=start, cache=cache)


def test_float16_keeps_what_it_cannot_hold(case, tmp_path):
    """As in HF: `wo` in float32, and with it the sums of the layers, so that nothing overflows."""
    model, params = auto.AutoModelForSeq2SeqLM.from_pretrained(case.path, dtype=jnp.float16)
    kept = {key for key, leaf in flatten(params).items() if leaf.dtype == jnp.float32}
    assert kept == {key for key in flatten(params) if key.endswith(".wo.weight")}
    auto.save_pretrained(tmp_path, model, params)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(case.path, dtype=torch.float16)
    theirs.save_pretrained(tmp_path / "theirs")
    assert tensors(tmp_path) == tensors(tmp_path / "theirs")
    large = jax.tree.map(lambda leaf: leaf * 60000 if leaf.dtype == jnp.float32 else leaf, params)
    ids, read = case.inputs.input_ids[:1, :20], case.inputs.input_ids[:1, 20:30]
    run = jax.jit(lambda params: model.apply({"params": params}, ids, decoder_input_ids=read, output_hidden_states=True))
    out = run(large)
    assert np.abs(out.encoder_hidden_states[1]).max() > 65504 and np.isfinite(out.logits).all()
    low, full = run(params).logits, case.forward(case.loaded[1], {"input_ids": ids, "decoder_input_ids": read}).logits
    assert low.dtype == jnp.float16 and np.abs(low - full).max() < 0.02 * np.abs(full).max()


def test_one_model_under_every_class(case, tmp_path):
    """A head of its own is made anew, aloud; an encoder's file is no whole model's."""
    model, params = auto.AutoModelForTextEncoding.from_pretrained(case.path)
    auto.save_pretrained(tmp_path / "encoder", model, params)
    assert "decoder.final_layer_norm.weight" not in load_file(tmp_path / "encoder" / "model.safetensors")
    reference = transformers.T5EncoderModel.from_pretrained(case.path).eval()
    reference.save_pretrained(tmp_path / "theirs")
    assert tensors(tmp_path / "encoder") == tensors(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"decoder\.block\.0"):
        auto.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "encoder")
    for task, key in (("SequenceClassification", "classification_head"), ("QuestionAnswering", "qa_outputs")):
        with pytest.warns(UserWarning, match=f"no weights for {key}"):
            model, params = getattr(auto, f"AutoModelFor{task}").from_pretrained(case.path)
        auto.save_pretrained(tmp_path / task, model, params)
        _, back = auto.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / task)
        jax.tree.map(np.testing.assert_array_equal, back, case.loaded[1])


def test_config():
    """Who says what about the head and the scale, in the configs of transformers 4 and 5."""
    for values in (
        {},
        {"tie_word_embeddings": False},
        {"scale_decoder_outputs": False},
        {"tie_word_embeddings": False, "scale_decoder_outputs": True},
    ):
        ours, theirs = T5Config.from_dict(values), transformers.T5Config(**values)
        assert ours.scale_decoder_outputs == theirs.scale_decoder_outputs
        written = transformers.T5Config(**ours.to_dict())
        assert written.scale_decoder_outputs == theirs.scale_decoder_outputs and written.num_decoder_layers == 6
        assert T5Config.from_dict(json.loads(theirs.to_json_string())).scale_decoder_outputs == theirs.scale_decoder_outputs
    assert T5Config.from_dict({"feed_forward_proj": "gated-silu"}).hidden_act == "silu"
    with pytest.raises(ValueError, match="expected an activation such as relu, or gated-<activation>"):
        T5Config(feed_forward_proj="twice-gelu")
    mine, other = T5Config().to_dict(), transformers.T5Config().to_dict()
    shared = mine.keys() & other.keys()
    assert len(shared) > 15 and {k: mine[k] for k in shared} == {k: other[k] for k in shared}


def test_rows_without_an_end():
    config = T5Config.from_dict({**SHAPE, "num_labels": 3})
    model = auto.AutoModelForSequenceClassification.class_for(config)(config)
    with pytest.raises(ValueError, match=r"rows \[1\] of input_ids have no eos_token_id \(1\)"):
        model.apply({"params": {}}, np.array([[5, 1], [5, 6]]))
    with pytest.raises(ValueError, match="the config has no eos_token_id"):
        model.clone(config=config.replace(eos_token_id=None)).apply({"params": {}}, np.array([[5, 1]]))


def test_parity_command_and_record(tmp_path):
    case = Seq2SeqCase.make(transformers.T5Config(**SHAPE | ONE_EACH), tmp_path / "model", task="AutoModelForSeq2SeqLM")
    report = parity.parity(case.path)
    assert report.passed and len(report.layers) == 4, str(report)
    assert report.layers[0].name == "encoder embeddings" and report.layers[-1].name == "decoder layer 0 + norm"
    parity.record(case.path, tmp_path / "answers", gradients=False)
    again = parity.check(case.path, tmp_path / "answers")
    assert again.passed and [row.name for row in again.layers] == [row.name for row in report.layers]


def test_generate_command(tmp_path, capsys):
    """A directory with a tokenizer: text in, the decoder's text out, alone and in a batch, as torch's."""
    path = fixtures.t5(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    hf = Seq2SeqCase.perturbed(
        transformers.T5ForConditionalGeneration(transformers.T5Config(**SHAPE | ONE_EACH | {"vocab_size": len(tokenizer)}))
    )
    hf.save_pretrained(path)
    prompts = ["translate: hello world", "summarize: a"]
    expected = []
    for prompt in prompts:
        tokens = hf.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=6, do_sample=False)[0]
        expected.append(tokenizer.decode(tokens, skip_special_tokens=True))
    arguments = ["--model", str(path), "--max-new-tokens", "6"]
    assert main(["generate", prompts[0], *arguments]) == 0
    assert capsys.readouterr().out.rstrip("\n") == expected[0]
    assert main(["generate", *prompts, *arguments]) == 0
    assert capsys.readouterr().out == "".join(f"{text}\n\n" for text in expected)
    assert main(["generate", *prompts, *arguments, "--jsonl", "-"]) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == expected
    assert main(["info", str(path)]) == 0 and "T5ForConditionalGeneration" in capsys.readouterr().out
    assert main(["convert", str(path), str(tmp_path / "copy")]) == 0 and tensors(tmp_path / "copy") == tensors(path)


def test_training_with_dropout(case):
    """A batch as a trainer has it: labels, from which the decoder reads. Noise where there is a key, and another with another."""
    model, params = case.scanned
    ids, mask = case.inputs.input_ids[:2, -60:], case.inputs.attention_mask[:2, -60:]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": case.inputs.input_ids[:2, :33]}
    optimizer = optax.sgd(0.01)
    noisy = jax.jit(lambda params, key: model.apply({"params": params}, **batch, rngs={"dropout": key}).loss)
    losses = [float(noisy(params, jax.random.key(n))) for n in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    step, state = make_train_step(model, optimizer), create_train_state(model, optimizer, params)
    state, first = step(state, batch)
    np.testing.assert_allclose(first["loss"], case.forward(case.loaded[1], batch).loss, rtol=1e-5)
    assert step(state, batch)[1]["loss"] < first["loss"] and min(abs(loss - first["loss"]) for loss in losses) > 1e-3
