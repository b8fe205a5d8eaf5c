"""`jaxmodels train` as a user runs it: every job on real files, one device and a mesh, stopped and started again, two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from chat_templates import CHATML
from processes import free_port

from jaxmodels.cli.main import main
from jaxmodels.cli.settings import read_settings
from jaxmodels.processing import train_bpe
from jaxmodels.training.data import text_example, write_packed

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [f"def add_{i}(a, b):\n    return a + b * {i}\n" + "    # and so on\n" * (i % 5) for i in range(40)]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tokenizer with a chat template, a checkpoint of torch's, and data of every kind."""
    path = tmp_path_factory.mktemp("train")
    tokenizer = train_bpe(TEXTS, 300, special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(path / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, vocab_size=300, bos_token_id=None, eos_token_id=0, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(path / "model")
    says = lambda role, content: {"role": role, "content": content}
    asked = [(f"what is {i} + {i}?", f"it is {2 * i}") for i in range(24)]
    rows = {
        "texts": [{"text": text} for text in TEXTS],
        "chats": [{"messages": [says("system", "sum"), says("user", question), says("assistant", answer)]} for question, answer in asked],
        "pairs": [{"prompt": question, "chosen": " " + answer, "rejected": " no idea at all"} for question, answer in asked],
    }
    for name, lines in rows.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    documents = [text_example(row, tokenizer=tokenizer) for row in rows["texts"]]
    write_packed(path / "packed", documents, 32)
    return path


def settings(files, out, source, **sections):
    training = {
        "output_dir": str(out),
        "max_steps": 8,
        "logging_steps": 1,
        "save_steps": 4,
        "learning_rate": "1e-2",
        "per_device_train_batch_size": 4,
    }
    training |= {"lr_scheduler_type": "constant", "per_device_eval_batch_size": 4}
    values = {"model": {"path": str(files / "model")}, "data": {"train": [{"path": str(files / source)}], "length": 32}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    values["training"] = training | sections.get("training", {})
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def loads_in_torch(path):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    out = model(**tokenizer("def add_3(a, b):", return_tensors="pt"))
    assert out.logits.shape[-1] == 300 and torch.isfinite(out.logits).all()
    return model


FROM_NOTHING = {"config": {"model_type": "llama", "vocab_size": 300, **SMALL}, "path": None}


def test_pretraining_goes_on_where_it_stopped(files, tmp_path, capsys):
    """Documents packed on the fly, in a mixture: stopped after 5 steps, in the middle of a window of documents."""
    mixture = {
        "train": [{"path": str(files / "texts.jsonl"), "weight": 2}, {"path": str(files / "packed" / "*.txt"), "text_field": "text"}]
    }
    (files / "packed").joinpath("more.txt").write_text("\n".join(f"line {i} of another text" for i in range(30)))
    model = FROM_NOTHING | {"tokenizer": str(files / "model")}
    held = {"eval": [{"path": str(files / "texts.jsonl")}], "window": 8}
    training = {"eval_strategy": "steps", "eval_steps": 4}
    whole = settings(files, tmp_path / "whole", "texts.jsonl", model=model, data=mixture | held, training=training)
    assert main(["train", str(whole)]) == 0
    out = capsys.readouterr().out
    assert "step 8/8" in out and "tokens/s" in out and out.endswith("hf: written\n")
    assert main(["train", str(whole), "--training.output_dir", str(tmp_path / "two"), "--max_steps", "5"]) == 0
    assert main(["train", str(whole), f"training.output_dir={tmp_path / 'two'}", f"data.train.0.path={files}/packed/more.txt"]) == 1
    assert "was taken in another stream: data: saved 'texts.jsonl, " in (err := capsys.readouterr().err) and err.count("\n") == 1
    changed = train_bpe(TEXTS[::-3], 300, special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"])
    changed.save_pretrained(tmp_path / "changed")
    assert main(["train", str(whole), f"training.output_dir={tmp_path / 'two'}", f"model.tokenizer={tmp_path / 'changed'}"]) == 1
    assert "in another stream: examples: saved \"text_example, field 'text', " in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert main(["train", str(whole), f"training.output_dir={tmp_path / 'two'}"]) == 0
    assert losses(tmp_path / "two") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0] - 0.5
    names = [tmp_path / run / "hf" / "model.safetensors" for run in ("whole", "two")]
    assert names[0].read_bytes() == names[1].read_bytes()
    loads_in_torch(tmp_path / "whole" / "hf")


def test_a_mesh_of_eight_devices_gives_the_losses_of_one(files, tmp_path):
    """Rows packed ahead of time; a step of 8 rows."""
    one = settings(files, tmp_path / "one", "packed/*.array_record", training={"per_device_train_batch_size": 8})
    assert main(["train", str(one)]) == 0
    mesh = ["mesh={fsdp: 4, tensor: 2}", "per_device_train_batch_size=2", f"output_dir={tmp_path / 'mesh'}", "model.scan_layers=true"]
    assert main(["train", str(one), *mesh]) == 0
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(tmp_path / "one"), rtol=1e-4)
    assert losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0] - 0.5


def test_sft_learns_the_assistants_tokens(files, tmp_path):
    out = tmp_path / "sft"
    assert main(["train", str(settings(files, out, "chats.jsonl", job="sft", data={"length": 64}))]) == 0
    assert losses(out)[-1] < losses(out)[0] - 1
    loads_in_torch(out / "hf")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_leaves_an_adapter_and_the_model_with_it(files, tmp_path):
    out = tmp_path / "lora"
    config = settings(files, out, "chats.jsonl", job="lora", lora={"r": 4, "lora_alpha": 16}, data={"length": 64})
    assert main(["train", str(config)]) == 0
    assert losses(out)[-1] < losses(out)[0] - 0.2
    merged = loads_in_torch(out / "hf")
    base = transformers.AutoModelForCausalLM.from_pretrained(files / "model")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        plain = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, out / "adapter")(ids).logits
        assert (merged(ids).logits - adapted).abs().max() < 1e-4 < (plain - adapted).abs().max()


def test_dpo_prefers_what_was_chosen(files, tmp_path):
    out = tmp_path / "dpo"
    config = settings(files, out, "pairs.jsonl", job="dpo", training={"num_train_epochs": 2, "max_steps": -1, "learning_rate": 1e-3})
    assert main(["train", str(config)]) == 0
    kept = list(out.glob("reference-*/*"))
    before, when = (out / "log.jsonl").read_text(), [file.stat().st_mtime_ns for file in kept]
    assert main(["train", str(config), "num_train_epochs=3", f"data.eval=[{{path: {files}/pairs.jsonl}}]", "--eval_strategy", "epoch"]) == 0
    assert len(kept) == 1 and when == [file.stat().st_mtime_ns for file in out.glob("reference-*/*")]  # not again
    lines = [json.loads(line) for line in before.splitlines()]
    assert any("eval_rewards/accuracies" in line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()))
    loads_in_torch(out / "hf")
    lines = [line for line in lines if "loss" in line]
    assert len(lines) == 12 and abs(lines[0]["loss"] - np.log(2)) < 1e-5  # the reference is the model itself
    assert lines[-1]["loss"] < 0.6 and lines[-1]["rewards/accuracies"] == 1 and lines[-1]["rewards/margins"] > 0.1


@pytest.mark.slow
def test_dpo_of_an_adapter_on_a_mesh(files, tmp_path):
    training = {"num_train_epochs": 1, "max_steps": -1, "learning_rate": 1e-3, "save_strategy": "no", "per_device_train_batch_size": 8}
    one = settings(files, tmp_path / "one", "pairs.jsonl", job="dpo", training=training, lora={"r": 4})
    assert main(["train", str(one)]) == 0
    mesh = ["mesh={fsdp: 4, tensor: 2}", "per_device_train_batch_size=2", f"output_dir={tmp_path / 'mesh'}"]
    assert main(["train", str(one), *mesh]) == 0
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(tmp_path / "one"), rtol=1e-4)
    assert abs(losses(tmp_path / "one")[0] - np.log(2)) < 1e-5 and losses(tmp_path / "one")[-1] < 0.69


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [[], ["lora.r=4"], ["job=sft", "length=64", "learning_rate=1e-3", "data.train=[{path: FILES/chats.jsonl}, {path: FILES/texts.jsonl}]"]],
)
def test_two_processes_give_the_losses_of_one(files, tmp_path, words):
    """Also of a mixture that is not packed, whose rows are of other lengths on every process."""
    words = [word.replace("FILES", str(files)) for word in words]
    one = settings(files, tmp_path / "one", "packed/*.array_record", training={"per_device_train_batch_size": 8})
    assert main(["train", str(one), *words]) == 0
    port = free_port()
    together = [f"distributed={{coordinator_address: 'localhost:{port}', num_processes: 2}}", "cpu_devices=2", "mesh={fsdp: 2, tensor: 2}"]
    together += ["per_device_train_batch_size=4", f"output_dir={tmp_path / 'two'}", *words]
    command = [sys.executable, "-m", "jaxmodels.cli.main", "train", str(one), *together]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen([*command, f"--distributed.process_id={i}"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "step 8/8" in outputs[0] and "step 8/8" not in outputs[1]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    loads_in_torch(tmp_path / "two" / "hf")


# ---- settings --------------------------------------------------------------------------------------------------------


def test_every_field_may_be_overridden(files, tmp_path):
    path = settings(files, tmp_path / "x", "texts.jsonl")
    words = [
        "--training.max_steps",
        "7",
        "data.train.0.weight=2",
        "--lora.r=4",
        "length=48",
        "lora.target_modules=[q_proj]",
        "mesh.tensor=2",
    ]
    found = read_settings(path, [*words, "--learning_rate", "3e-4", "--dpo.rpo_alpha", "null", "job=sft", "lr_scheduler_kwargs.min_lr=0"])
    assert found.training.max_steps == 7 and found.training.learning_rate == 3e-4 and found.data.train[0].weight == 2
    assert found.lora.r == 4 and found.lora.target_modules == ["q_proj"] and found.data.length == 48 and found.mesh == {"tensor": 2}
    assert (
        found.job == "sft"
        and found.dpo.rpo_alpha is None
        and found.training.lr_scheduler_kwargs == {"min_lr": 0}
        and found.training.save_steps == 4
    )


def test_numbers_and_words(tmp_path, files, capsys):
    """1e-4 is a number in whatever field, `no` a word and, where yes or no is asked, an answer; every field is listed."""
    path = settings(files, tmp_path / "x", "texts.jsonl", training={"learning_rate": 1})
    path.write_text(path.read_text() + "job: sft\n" + "dpo: {beta: 1e-1}\n")
    found = read_settings(path, ["eval_strategy=no", "--bf16", "yes", "--lr_scheduler_kwargs", "{min_lr: 1e-6, a: [.5, -3E+2, 1_000]}"])
    assert found.training.eval_strategy == "no" and found.training.bf16 is True and found.dpo.beta == 0.1
    assert found.training.lr_scheduler_kwargs == {"min_lr": 1e-6, "a": [0.5, -300.0, 1000]}
    path.write_text(path.read_text() + "job: dpo\n")
    with pytest.raises(ValueError, match=r"not readable as YAML \('job' stands twice in one place"):
        read_settings(path)
    assert main(["train", "nowhere.yaml", "--help"]) == 0
    listed = capsys.readouterr().out
    assert "  training.learning_rate: float = 5e-05" in listed and "  data.train.0.path: str | list[str]\n" in listed
    assert "  lora.r: int = 8" in listed and "  job: str = 'pretrain'" in listed


WRONG = {
    "lenth=3": "lenth is not a field; the closest is data.length",
    "training.learning_rat=3": "training.learning_rat is not a field; the closest is training.learning_rate",
    "training.beta=3": "training.beta is not a field; the closest is dpo.beta",
    "max_step=3": "max_step is not a field; the closest is training.max_steps",
    "data.train.0.pth=x": "data.train.0.pth is not a field; the closest is data.train.0.path",
    "data.train.2.path=x": "data.train is a list of 1; '2' is the number of none of them",
    "data.train={}": "data.train is {}; expected list",
    "data.length=2.5": "data.length is 2.5; expected int",
    "learning_rate=fast": "training.learning_rate is 'fast'; expected float",
    "model.scan_layers=1": "model.scan_layers is 1; expected bool",
    "model.dtype=float99": "model: dtype is 'float99'; expected one of auto, float32, bfloat16, float16",
    "model.path=null": "model needs a path (of a checkpoint) or a config (for a model from nothing), one of them",
    "training.fsdp=full_shard": "training: TrainingArguments does not take fsdp='full_shard'",
    "training=3": "training is 3; expected fields, such as output_dir",
    "job=sftt": "job is 'sftt'; expected one of pretrain, sft, dpo, lora",
    "job.x=3": "job is 'pretrain', which has no field 'x'",
    "mesh.fsdp=four": "mesh is {'fsdp': 'four'}; expected numbers of devices",
    "rules=fsdp": "rules 'fsdp' need a mesh",
    "data.train=[]": "data: train is empty; expected a source",
    "length=1": "data: length is 1; expected at least 2",
    "cpu_devices=0": "cpu_devices is 0; expected at least 1",
    "training.max_grad_norm=-1": "training: max_grad_norm is -1.0; expected at least 0",
    "lora.r=0": "lora: LoRA's rank r is 0",
    "lora.modules_to_save=score": "lora: modules_to_save is 'score'; expected a list of names, [score]",
    "lora.lora_dropout=1": "lora: lora_dropout is 1.0; expected at least 0 and below 1",
    "data.train.0.weight=0": "data.train.0: weight is 0.0; expected a number above 0",
    "dpo.loss_type=sig": "dpo: loss_type 'sig' is not known; known are sigmoid",
    "dpo.beta=0": "dpo: beta 0.0 must be above 0",
    "dpo.beta=[": "dpo.beta: '[' is not readable as YAML",
    "--bf16 --max_steps 1": "'--bf16': expected --section.field value or section.field=value",
    "eval_strategy=epoch": "training.eval_strategy is 'epoch': evaluation needs data.eval",
    "training.fp16=perhaps": "training.fp16 is 'perhaps'; expected bool",
    "max_steps": "'max_steps': expected --section.field value or section.field=value",
    "--max_steps": "'--max_steps': expected --section.field value or section.field=value",
}


@pytest.mark.parametrize("word", WRONG)
def test_wrong_settings_are_one_line(files, tmp_path, capsys, word):
    path = settings(files, tmp_path / "x", "texts.jsonl", job="pretrain")
    assert main(["train", str(path), *word.split(" ")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"jaxmodels: {WRONG[word]}") and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_wrong_data_is_one_line(files, tmp_path, capsys):
    path = str(settings(files, tmp_path / "x", "texts.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": "fine"}\n{"txt": 1}\n')

    def says(*words):
        assert main(["train", path, *words]) == 1
        return capsys.readouterr().err

    assert "job dpo takes no data.packing and no weights" in says("job=dpo", "data.packing=true")
    assert "job dpo takes no data.packing and no weights" in says("job=dpo", "data.train.0.weight=2")
    assert "row 0: has no field 'chosen'; it has '" in says("job=dpo", f"data.train.0.path={files}/packed/*.array_record")
    assert "nowhere.jsonl: no such file" in says("data.train.0.path=nowhere.jsonl", "model.path=nowhere", f"model.tokenizer={files}/model")
    assert "optim 'adamx' is not known" in says("job=dpo", f"data.train.0.path={files}/pairs.jsonl", "optim=adamx")
    assert not (tmp_path / "x").exists()
    assert f"{tmp_path}/bad.jsonl, line 3: has no field 'text'; it has 'txt'" in says(f"data.train.0.path={tmp_path}/bad.jsonl")
    assert f"{files}/packed/rows-00000.array_record, row 0: is packed to 32 tokens, data.length is 48" in says(
        f"data.train.0.path={files}/packed/rows-00000.array_record", "length=48"
    )
    assert "nowhere/*.jsonl: no such file" in says("data.train.0.path=nowhere/*.jsonl")
    both = f"data.train=[{{path: {files}/texts.jsonl}}, {{path: {files}/packed/rows-00000.array_record}}]"
    assert "some sources are packed ahead of time and some are not" in says(both, "length=32")
    (tmp_path / "list.yaml").write_text("- a\n")
    assert main(["train", str(tmp_path / "list.yaml")]) == 1 and "holds list; expected fields, such as data, job" in capsys.readouterr().err


def test_what_a_model_from_nothing_is_made_of(files, tmp_path, capsys):
    model = FROM_NOTHING["config"] | {"vocab_size": 200}
    path = settings(files, tmp_path / "x", "texts.jsonl", model={"path": None, "config": model, "tokenizer": str(files / "model")})
    assert main(["train", str(path)]) == 1
    assert "the tokenizer has 300 tokens, the model's vocabulary 200" in capsys.readouterr().err
    assert main(["train", str(path), "model.config.hidden_sise=8", "model.config.pretraining_tp=1"]) == 1
    assert "model.config.hidden_sise is not a field of llama; the closest is hidden_size" in capsys.readouterr().err
