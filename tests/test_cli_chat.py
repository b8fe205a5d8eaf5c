"""`jaxmodels chat` as a dialogue: its kept cache changes no answer, and it ends, is interrupted and refuses as a user expects."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import jax
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import jaxmodels as jm
from jaxmodels.cli import text
from jaxmodels.cli.main import main
from jaxmodels.processing import Tokenizer

TURN = "{% if m.role == 'system' %}<|sys|>{% elif m.role == 'user' %}<|user|>{% else %}<|bot|>{% endif %}{{ m.content }}<|end|>"
TEMPLATE = f"{{% for m in messages %}}{TURN}{{% endfor %}}{{% if add_generation_prompt %}}<|bot|>{{% endif %}}"
LINES = ["hello", "what now", "tell me more", "x"]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A random model that answers in letters, whose tokens are bytes: what it says is read again as the same ids."""
    path = tmp_path_factory.mktemp("talker")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer = Tokenizer(backend, eos_token="<|end|>", chat_template=TEMPLATE)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|bot|>", "<|sys|>"]})
    tokenizer.save_pretrained(path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": False}
    pad = tokenizer.convert_tokens_to_ids("<|user|>")  # a token of every turn: only the attention mask says that it is no padding
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad, "initializer_range": 0.3}
    config = jm.AutoConfig.for_model("llama", vocab_size=len(tokenizer), **sizes, **ids)
    model, params = jm.AutoModelForCausalLM.from_config(config, key=jax.random.key(3))
    quiet = [i for i, letter in enumerate(alphabet) if not (letter.isascii() and letter.isalpha())]
    head = params["lm_head"]["weight"]
    params["lm_head"]["weight"] = head.at[jax.numpy.array([*quiet, pad, pad + 1, pad + 2])].set(0)
    jm.save_pretrained(path, model, params)
    return path


@pytest.mark.parametrize(("more", "keeps"), [({}, True), ({"--system": "be kind"}, True), ({"--repetition-penalty": "1.5"}, False)])
def test_every_answer_is_that_of_the_whole_conversation(talker, capsys, monkeypatch, more, keeps):
    calls = []
    monkeypatch.setattr(text, "run", lambda *args, cache, **options: calls.append(cache) or jm.generate(*args, cache=cache, **options))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(LINES)))
    assert main(["chat", "--model", str(talker), "--max-new-tokens", "8", *(word for pair in more.items() for word in pair)]) == 0
    out, err = capsys.readouterr()
    assert [cache is not None for cache in calls] == [False, *[keeps] * (len(LINES) - 1)]
    model, params = jm.AutoModelForCausalLM.from_pretrained(talker)
    tokenizer = jm.AutoTokenizer.from_pretrained(talker)
    options = {"repetition_penalty": 1.5} if "--repetition-penalty" in more else {}
    messages = [{"role": "system", "content": "be kind"}] if "--system" in more else []
    answers = []
    for line in LINES:
        messages.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        res = jm.generate(model, params, ids.input_ids, ids.attention_mask, max_new_tokens=8, **options)
        answers.append(tokenizer.decode(res.sequences[0, ids.input_ids.shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert out == "".join(f"{answer}\n" for answer in answers)  # nothing else where standard input is no terminal
    assert len(set(answers)) > 1 and err.count("tokens/s") == len(LINES)


def test_bytes_that_are_no_text(talker, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("caf\udce9\n"))
    assert main(["chat", "--model", str(talker)]) == 1
    assert "is the lone surrogate '\\udce9'" in capsys.readouterr().err


def test_what_cannot_talk_is_refused_before_its_weights_are_read(talker, capsys, tmp_path):
    tokenizer = jm.AutoTokenizer.from_pretrained(talker)
    said = {"llama": "has no chat template; continue text with `jaxmodels generate`", "t5": "t5 has an encoder, which reads once"}
    for model_type, message in said.items():
        tokenizer.chat_template = TEMPLATE if model_type == "t5" else None
        tokenizer.save_pretrained(tmp_path / model_type)
        config = jm.AutoConfig.from_pretrained(talker).to_dict() if model_type == "llama" else {"vocab_size": 300}
        (tmp_path / model_type / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        assert main(["chat", "--model", str(tmp_path / model_type)]) == 1
        assert message in capsys.readouterr().err


def test_interrupted_in_the_middle_of_an_answer(talker, request):
    """Ctrl-C ends the command with status 130, a line of its own and no traceback."""
    terminal, other = pty.openpty()
    command = [sys.executable, "-m", "jaxmodels.cli.main", "chat", "--model", str(talker), "--max-new-tokens", "100000"]
    here = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in a shell's background ignore it, and so would the command
    chat = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True)
    signal.signal(signal.SIGINT, here)
    request.addfinalizer(chat.kill)
    os.close(other)
    said = b""

    def hear(until):
        nonlocal said
        end = time.monotonic() + 120
        while not until(said) and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    said += os.read(terminal, 4096)
                except OSError:  # the other end is closed
                    return

    hear(lambda said: b"> " in said)
    os.write(terminal, b"hello\n")
    hear(lambda said: len(said.partition(b"hello\r\n")[2]) > 20)
    os.killpg(chat.pid, signal.SIGINT)  # what a terminal does at Ctrl-C
    hear(lambda said: False)
    assert chat.wait(60) == 130
    os.close(terminal)
    assert said.startswith(b"> hello\r\n") and said.endswith(b"\r\n") and b"Traceback" not in said
