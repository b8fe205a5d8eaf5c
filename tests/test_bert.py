import numpy as np
import pytest
import torch
import transformers
from tester import EncoderTester, EncoderVariantTester, VariantTester

from jaxmodels import auto
from jaxmodels.generation import generate
from jaxmodels.params import abstract_params

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "pad_token_id": None,
}


def old_names(file):
    """As TensorFlow's conversions wrote them."""
    return {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x for key, x in file.items()}


def with_all_heads(file):
    """As in google-bert/bert-base-uncased: both heads of the pretraining, the tied decoder a second time, a buffer."""
    decoder = {
        "cls.predictions.decoder.weight": file["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": file["cls.predictions.bias"],
        "cls.seq_relationship.weight": np.ones((2, 48), np.float32),
        "cls.seq_relationship.bias": np.ones(2, np.float32),
    }
    pooler = {"bert.pooler.dense.weight": np.ones((48, 48), np.float32), "bert.pooler.dense.bias": np.ones(48, np.float32)}
    return old_names(file) | decoder | pooler | {"bert.embeddings.position_ids": np.arange(512)[None]}


def without_prefix(file):
    return {key.removeprefix("bert."): x for key, x in file.items()}


class TestBert(EncoderTester):
    hf_config = transformers.BertConfig(**SHAPE)
    own_heads = True
    full_size = ({}, 110_106_428)  # google-bert/bert-base-uncased
    full_size_task = "AutoModelForPreTraining"
    other_keys = (old_names, with_all_heads, without_prefix)


class TestBertUntied(EncoderVariantTester):
    hf_config = transformers.BertConfig(**SHAPE | {"num_attention_heads": 1, "hidden_act": "gelu_new"}, tie_word_embeddings=False)


class TestBertDecoder(VariantTester):
    hf_config = transformers.BertConfig(**SHAPE, is_decoder=True)
    others = {"token_type_ids": 2}  # noqa: RUF012
    greedy = True

    def test_greedy(self, case):
        assert case.report.greedy and case.report.greedy_equal, str(case.report)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    hf = transformers.BertModel(transformers.BertConfig(**SHAPE)).eval()
    hf.save_pretrained(path)
    return hf, path


def test_pooler_of_padded_rows(base):
    """A row's first real token, wherever padding is; from a file of the bare model and through a head's file."""
    hf, path = base
    model, params = auto.AutoModel.from_pretrained(path)
    ids = np.random.default_rng(0).integers(1, 263, (3, 40))
    mask = np.ones_like(ids)
    mask[1, :17], mask[2, 23:] = 0, 0
    ours = model.apply({"params": params}, ids, attention_mask=mask).pooler_output
    with torch.no_grad():
        theirs = [hf(torch.tensor(row[m == 1][None])).pooler_output[0] for row, m in zip(ids, mask)]
    np.testing.assert_allclose(ours, np.stack(theirs), atol=1e-5)


def test_classes_with_and_without_pooler(base, tmp_path):
    """A head without pooler leaves it in the file; a class with one makes it anew, aloud."""
    _, path = base
    with pytest.warns(UserWarning, match="no weights for cls"):
        masked, params = auto.AutoModelForMaskedLM.from_pretrained(path)
    assert "pooler" not in params["bert"]
    auto.save_pretrained(tmp_path, masked, params)
    with pytest.warns(UserWarning, match="no weights for pooler"):
        _, again = auto.AutoModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again["pooler"]["dense"]["weight"].shape, (48, 48))


def test_refusals(base):
    _, path = base
    with pytest.warns(UserWarning, match="no weights"):
        model, params = auto.AutoModelForCausalLM.from_pretrained(path)
    ids = np.ones((1, 4), np.int32)
    with pytest.raises(ValueError, match="is_decoder=True"):
        generate(model, params, ids, max_new_tokens=2)
    with pytest.warns(UserWarning, match="no weights"):
        model, params = auto.AutoModelForMultipleChoice.from_pretrained(path)
    with pytest.raises(ValueError, match="expects \\[batch, choices, tokens\\]"):
        model.apply({"params": params}, ids)
    for change in ({"position_embedding_type": "relative_key"}, {"add_cross_attention": True}):
        with pytest.raises(ValueError, match="absolute positions and no cross-attention"):
            auto.AutoConfig.for_model("bert", **change)
    config = auto.AutoConfig.for_model("bert", **SHAPE)
    with pytest.raises(ValueError, match="'splash' has no bidirectional form"):
        abstract_params(auto.AutoModel.class_for(config)(config, attn_implementation="splash"))
