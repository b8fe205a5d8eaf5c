"""Where our numbers and torch's stop agreeing: hidden states, logits, greedy tokens and gradients on hostile inputs.

`parity(path)` runs both sides, `record(path, file)` stores torch's answers, `check(path, file)` compares with them where there is no
torch. Truth for a padded row is torch in float32 on that row alone, unpadded. torch and transformers (the extra `test`) are imported
inside functions.

Axis letters: B rows, T columns, R real tokens of all rows one after another, D hidden, V vocabulary."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.convert.errors import CheckpointError
from jaxmodels.ops.precision import parity_mode
from jaxmodels.params import flatten

FORMAT = "jaxmodels-parity-1"
SAMPLE = 1 << 16  # entries of a gradient that are kept, evenly spread
# Whatever the checkpoint's generation_config says.
GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "min_length": 0, "eos_token_id": -1, "pad_token_id": 0}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """input_ids and attention_mask [B,T], padded with arbitrary ids; `new_tokens` are then decoded greedily.

    others: what else the model takes, [B,T] by name. masked: for a masked language model, whose labels are of the tokens themselves.
    decoder: of an encoder-decoder model, what its decoder reads; logits and labels are of these."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    new_tokens: int = 16
    others: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    masked: bool = False
    decoder: Inputs | None = None

    @property
    def others_padded(self) -> dict[str, np.ndarray]:
        """What our model takes beside input_ids, attention_mask and labels."""
        read = self.decoder
        decoder = {} if read is None else {"decoder_input_ids": read.input_ids, "decoder_attention_mask": read.attention_mask}
        return {**self.others, **decoder}

    def alone(self, b: int) -> dict[str, np.ndarray]:
        """Row b without its padding, [n] each, by the model's names."""
        real = lambda x, mask: x[b][mask[b] == 1]
        found = {name: real(x, self.attention_mask) for name, x in {"input_ids": self.input_ids, **self.others}.items()}
        return found if self.decoder is None else found | {"decoder_input_ids": self.decoder.alone(b)["input_ids"]}

    def targets(self, b: int) -> np.ndarray:
        """[n] of row b without its padding: what each of its logits stands for, -100 for nothing."""
        if self.decoder is not None:
            return self.decoder.targets(b)
        labels = self.labels[b][self.attention_mask[b] == 1]
        return labels if self.masked else np.append(labels[1:], -100)

    def rows(self) -> Iterator[np.ndarray]:
        """The real tokens of each row."""
        for ids, mask in zip(self.input_ids, self.attention_mask):
            yield ids[mask.astype(bool)]

    @property
    def labels(self) -> np.ndarray:
        """As the model takes them. Of the tokens that follow another: padding before a row's first token predicts nothing. Masked: of every
        third token. Of an encoder-decoder model in the place of the token before."""
        if self.decoder is not None:
            return np.pad(self.decoder.labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
        follows = np.pad(self.attention_mask[:, :-1], ((0, 0), (1, 0))) * self.attention_mask
        chosen = self.attention_mask * (np.cumsum(self.attention_mask, 1) % 3 == 1) if self.masked else follows
        return np.where(chosen == 1, self.input_ids, -100)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one side says. `hidden`: the embeddings and what each layer gives, [R,D] each, the last after the final norm, for every stack
    (an encoder, its decoder); logits [R,V]; greedy [B,new_tokens]; gradients of the mean next-token loss over all rows by the file's key, a
    sample of each. `encoder`: how many of the hidden states are an encoder's."""

    hidden: tuple[np.ndarray, ...]
    logits: np.ndarray
    greedy: np.ndarray | None = None
    gradients: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    encoder: int = 0


def hostile_inputs(vocab_size: int, max_length: int = 300, new_tokens: int = 16, seed: int = 0) -> Inputs:
    """Four rows of very different lengths, left-padded with random tokens, none a multiple of 8 at the full 300 columns."""
    rng = np.random.default_rng(seed)
    T = max(max_length, 8)
    lengths = np.array([T, T * 7 // 10 + 1, T * 3 // 10 + 3, 7])
    ids = rng.integers(0, vocab_size, (4, T), dtype=np.int32)
    return Inputs(ids, (np.arange(T) >= T - lengths[:, None]).astype(np.int32), new_tokens)


def with_decoder(inputs: Inputs, vocab_size: int) -> Inputs:
    """For an encoder-decoder model: its decoder reads other rows, long ones where the encoder's are short."""
    shorter = hostile_inputs(vocab_size, inputs.input_ids.shape[1] * 3 // 7, seed=1)
    return dataclasses.replace(inputs, decoder=Inputs(shorter.input_ids[::-1], shorter.attention_mask[::-1]))


def _stacks(out: Any) -> list[tuple[Any, ...]]:
    """The hidden states of every stack of a model."""
    if hasattr(out, "encoder_hidden_states"):
        return [out.encoder_hidden_states, out.decoder_hidden_states]
    return [out.hidden_states]


def _sample(gradient: np.ndarray) -> np.ndarray:
    flat = gradient.astype(np.float32).reshape(-1)
    return flat[:: -(-flat.size // SAMPLE)]


def in_double(model: Any) -> Any:
    """The torch model in float64; for that its experts run one by one, as torch's grouped products know no float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.double()


@contextmanager
def fresh_rope(model: Any) -> Iterator[None]:
    """Torch's dynamic rope remembers the longest sequence it has seen; afterwards `model` has forgotten what it saw inside."""
    modules = [(m, copy.deepcopy(m)) for m in model.modules() if hasattr(m, "original_inv_freq")]
    yield
    for module, before in modules:
        module.__dict__ = before.__dict__


def torch_answers(model: Any, inputs: Inputs, *, greedy: bool = True, gradients: bool = True) -> Answers:
    """What a torch language model says about each row alone, in its own dtype."""
    import torch

    hidden, logits, tokens = [], [], []
    predicted = int((inputs.labels != -100).sum())
    as_torch = lambda x: torch.tensor(x, dtype=torch.long)
    model.zero_grad()
    for b in range(len(inputs.input_ids)):
        row = {name: as_torch(x[None]) for name, x in inputs.alone(b).items()}
        with fresh_rope(model), torch.set_grad_enabled(gradients):
            out = model(**row, output_hidden_states=True, use_cache=False)
            if gradients:
                loss = torch.nn.functional.cross_entropy(out.logits[0].float(), as_torch(inputs.targets(b)), reduction="sum")
                (loss / predicted).backward()
        stacks = _stacks(out)
        hidden.append([h[0].detach().double().numpy() for stack in stacks for h in stack])
        logits.append(out.logits[0].detach().double().numpy())
        if greedy:
            with fresh_rope(model), _plain_generation(model, inputs.new_tokens) as options:
                ids = row["input_ids"]
                tokens.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, -inputs.new_tokens :].numpy())
    return Answers(
        tuple(np.concatenate(parts) for parts in zip(*hidden)),
        np.concatenate(logits),
        np.stack(tokens) if greedy else None,
        _torch_gradients(model) if gradients else {},
        sum(map(len, stacks[:-1])),
    )


@contextmanager
def _plain_generation(model: Any, new_tokens: int) -> Iterator[dict[str, Any]]:
    """Options of greedy decoding, whatever the checkpoint's generation_config says. No cache with ropes whose frequencies change with
    the length: torch's keeps keys that were turned by the old ones."""
    from transformers import GenerationConfig

    kind = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")
    own = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=0, decoder_start_token_id=own.decoder_start_token_id)
    yield {"do_sample": False, "max_new_tokens": new_tokens, "use_cache": kind not in ("dynamic", "longrope")}
    model.generation_config = own


def _torch_gradients(model: Any) -> dict[str, np.ndarray]:
    """By the keys of the file, which are not always the module's: the gradients are saved as if they were the parameters."""
    import tempfile

    import torch
    from safetensors import safe_open

    values = {p: p.data for p in (*model.parameters(), *model.buffers())}
    sampled: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as directory:
        for p in values:
            p.data = torch.zeros_like(p) if p.grad is None else p.grad
        try:
            model.save_pretrained(directory)
        finally:
            for p, value in values.items():
                p.data, p.grad = value, None
        for file in sorted(Path(directory).glob("*.safetensors")):
            with safe_open(file, framework="numpy") as tensors:
                sampled |= {key: _sample(tensors.get_tensor(key)) for key in tensors.keys()}  # noqa: SIM118
    return sampled


@lru_cache(maxsize=8)
def program(model: Any, gradients: bool) -> Any:
    """Jitted: (params, input_ids, attention_mask, labels, other inputs) -> (hidden states of each stack, logits), gradients or None."""

    def run(params: Any, ids: jax.Array, mask: jax.Array, labels: jax.Array, others: dict[str, jax.Array]) -> tuple[jax.Array, tuple]:
        out = model.apply({"params": params}, ids, attention_mask=mask, labels=labels, output_hidden_states=True, **others)
        return out.loss, (_stacks(out), out.logits)

    both = jax.value_and_grad(run, has_aux=True)
    return jax.jit(lambda *x: ((y := both(*x))[0][1], y[1]) if gradients else (run(*x)[1], None))


def our_answers(model: Any, params: Any, inputs: Inputs, *, greedy: bool = True, gradients: bool = True) -> Answers:
    """What our language model says about the padded batch, where the mask is 1."""
    from jaxmodels.auto import conversion_of
    from jaxmodels.convert.load import unload
    from jaxmodels.generation import generate

    ids, mask = inputs.input_ids, inputs.attention_mask
    tokens, sampled = None, {}
    with parity_mode():
        (stacks, logits), tree = program(model, gradients)(params, ids, mask, inputs.labels, inputs.others_padded)
        if greedy:
            result = generate(model, params, ids, mask, max_new_tokens=inputs.new_tokens, **GREEDY)  # type: ignore[arg-type]
            tokens = np.asarray(result.sequences[:, -inputs.new_tokens :])
    if gradients:
        rules, prefix = conversion_of(model)
        sampled = {key: _sample(tensor.read()) for key, tensor in unload(flatten(tree), rules=rules, base_prefix=prefix).items()}
    wide = lambda x, mask: np.asarray(x, np.float32)[mask == 1].astype(np.float64)
    masks = [mask] if inputs.decoder is None else [mask, inputs.decoder.attention_mask]
    hidden = tuple(wide(h, real) for stack, real in zip(stacks, masks, strict=True) for h in stack)
    return Answers(hidden, wide(logits, masks[-1]), tokens, sampled, sum(map(len, stacks[:-1])))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. `torch_error`: torch's own in float32 against float64, nan where that was not run."""

    name: str
    error: float
    tolerance: float
    torch_error: float = float("nan")

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for nan


@dataclasses.dataclass(frozen=True)
class Report:
    """The comparison of ours with torch's. `greedy`: per row how many tokens agree before the first that does not; gradients as norms."""

    layers: tuple[Row, ...]
    logits: Row
    greedy: tuple[int, ...]
    new_tokens: int
    gradients: tuple[Row, ...]

    @property
    def first_divergent(self) -> str | None:
        """The first of embeddings, layers and logits that is over its tolerance."""
        return next((row.name for row in (*self.layers, self.logits) if not row.passed), None)

    @property
    def greedy_equal(self) -> bool:
        return all(n == self.new_tokens for n in self.greedy)

    @property
    def passed(self) -> bool:
        return self.first_divergent is None and self.greedy_equal and all(row.passed for row in self.gradients)

    def __str__(self) -> str:
        def table(title: str, rows: Any) -> list[str]:
            width = max(len(row.name) for row in rows)
            head = f"{title:{width}}   max error   tolerance   torch f32-f64"
            return [
                head,
                *(
                    f"{r.name:{width}}   {r.error:9.2e}   {r.tolerance:9.2e}   {r.torch_error:13.2e}{'' if r.passed else '   OVER'}"
                    for r in rows
                ),
            ]

        lines = table("layer", (*self.layers, self.logits))
        lines += ["", f"first layer that diverges: {self.first_divergent or 'none'}"]
        if self.greedy:
            agree = ", ".join(f"{n}/{self.new_tokens}" for n in self.greedy)
            lines.append(f"greedy tokens that agree, by row: {agree}{'' if self.greedy_equal else '   OVER'}")
        if self.gradients:
            worst = sorted(self.gradients, key=lambda r: -np.nan_to_num(r.error / r.tolerance, nan=np.inf))
            over = sum(not row.passed for row in worst)
            lines += ["", f"gradients over tolerance: {over} of {len(worst)}; the worst, as norms:"]
            lines += [
                f"{r.name}   {r.error:.2e} (tolerance {r.tolerance:.2e}){'' if r.passed else '   OVER'}"
                for r in worst[: max(5, min(over, 50))]
            ]
        return "\n".join([*lines, "", "PASSED" if self.passed else "FAILED"])


def tolerance(reference: np.ndarray) -> float:
    """1e-4 of the standard deviation where that is above 1, for float32."""
    return 1e-4 * max(1.0, float(reference.std()))


def _row(name: str, ours: np.ndarray, torch: np.ndarray, torch64: np.ndarray | None) -> Row:
    if ours.shape != torch.shape:
        raise ValueError(f"{name}: ours has shape {ours.shape}, torch's {torch.shape}")
    own = float("nan") if torch64 is None else float(np.abs(torch - torch64).max())
    return Row(name, float(np.abs(ours - torch).max()), tolerance(torch), own)


def compare(ours: Answers, torch: Answers, torch64: Answers | None = None) -> Report:
    """Row by row, with the tolerances of float32; gradients by name: |difference| <= 1e-4 max(|g|, 1e-3 |all gradients|)."""
    n, E = len(torch.hidden), torch.encoder
    if (len(ours.hidden), ours.encoder) != (n, E):
        count = lambda answers: f"{len(answers.hidden)}" + (f" ({answers.encoder} of an encoder)" if answers.encoder else "")
        raise ValueError(f"ours has {count(ours)} hidden states, torch {count(torch)}")
    stack = lambda n: ["embeddings", *(f"layer {i}" for i in range(n - 2)), f"layer {n - 2} + norm"]
    names = [f"encoder {name}" for name in stack(E)] + [f"decoder {name}" for name in stack(n - E)] if E else stack(n)
    wide = [None] * n if torch64 is None else torch64.hidden
    layers = tuple(_row(*x) for x in zip(names, ours.hidden, torch.hidden, wide))
    logits = _row("logits", ours.logits, torch.logits, None if torch64 is None else torch64.logits)
    greedy: tuple[int, ...] = ()
    if ours.greedy is not None and torch.greedy is not None:
        greedy = tuple(int(np.cumprod(a == b).sum()) for a, b in zip(ours.greedy, torch.greedy))
    return Report(
        layers, logits, greedy, 0 if torch.greedy is None else torch.greedy.shape[1], compare_gradients(ours.gradients, torch.gradients)
    )


def compare_gradients(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> tuple[Row, ...]:
    """A row for each gradient: the norm of what they differ by and its limit, 1e-4 of torch's norm or of a thousandth of all gradients'."""
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"gradients of ours alone: {sorted(ours.keys() - theirs.keys())}; of torch alone: {sorted(theirs.keys() - ours.keys())}"
        )
    norm = lambda x: float(np.linalg.norm(x.astype(np.float64)))
    whole = norm(np.array([norm(g) for g in theirs.values()]))
    return tuple(Row(k, norm(ours[k] - g), 1e-4 * max(norm(g), 1e-3 * whole)) for k, g in theirs.items())


def _load_torch(path: Path) -> Any:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"parity runs the checkpoint in torch too, and {error.name} is not installed: pip install 'jaxmodels[test]', "
            "or run `parity record` on a machine that has it and `parity check` here"
        ) from error
    config = transformers.AutoConfig.from_pretrained(path)
    cls = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    try:
        model = cls.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", use_safetensors=True)
    except Exception as error:  # whatever torch raises
        raise CheckpointError(f"{path}: loads here, but not in torch: {type(error).__name__}: {error}") from error
    return model.eval().requires_grad_(True)


def _both_precisions(path: Path, inputs: Inputs, gradients: bool) -> tuple[Answers, Answers]:
    model = _load_torch(path)
    return torch_answers(model, inputs, gradients=gradients), torch_answers(in_double(model), inputs, greedy=False, gradients=False)


def _inputs_for(path: Path) -> Inputs:
    from jaxmodels.auto import AutoConfig

    config = AutoConfig.from_pretrained(path)
    new = 16
    inputs = hostile_inputs(config.vocab_size, min(300, getattr(config, "max_position_embeddings", 300) - new), new)
    return with_decoder(inputs, config.vocab_size) if config.is_encoder_decoder else inputs


def _ours(path: Path, inputs: Inputs, gradients: bool) -> Answers:
    from jaxmodels.auto import AutoConfig, text_task

    model, params = text_task(AutoConfig.from_pretrained(path)).from_pretrained(path, dtype=jnp.float32)
    return our_answers(model, params, inputs, gradients=gradients)


def _check(directory: Path) -> None:
    """Raise what loading would, before torch spends its time on the checkpoint. Nothing is read but the headers."""
    from jaxmodels.auto import conversion_of, main_dtype, read_config, text_task
    from jaxmodels.convert.dequantize import dequantized
    from jaxmodels.convert.files import read_checkpoint
    from jaxmodels.convert.load import canonical
    from jaxmodels.params import abstract_params

    config = read_config(directory)
    source = dequantized(read_checkpoint(directory), config)
    config = config.matched(source)
    model = text_task(config).class_for(config)(config)
    rules, prefix = conversion_of(model)
    canonical(source, flatten(abstract_params(model, main_dtype(source))), rules=rules, base_prefix=prefix, where=str(directory))


def parity(path: str | Path, *, gradients: bool = True, **hub: Any) -> Report:
    """Both sides of a causal LM's checkpoint in float32. `gradients` doubles the memory; hub: revision, cache_dir, … of a hub id."""
    from jaxmodels.convert.hub import resolve

    directory = resolve(path, **hub)
    _check(directory)
    inputs = _inputs_for(directory)
    torch32, torch64 = _both_precisions(directory, inputs, gradients)
    return compare(_ours(directory, inputs, gradients), torch32, torch64)


def record(path: str | Path, file: str | Path, *, gradients: bool = True, **hub: Any) -> None:
    """Store the inputs and torch's answers in one safetensors file."""
    from safetensors.numpy import save_file

    from jaxmodels.convert.hub import resolve

    directory = resolve(path, **hub)
    if not Path(file).absolute().parent.is_dir():
        raise CheckpointError(f"{file}: there is no directory {Path(file).absolute().parent} to write it to")
    _check(directory)
    inputs = _inputs_for(directory)
    torch32, torch64 = _both_precisions(directory, inputs, gradients)
    import torch
    import transformers

    tensors = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask, "greedy": torch32.greedy.astype(np.int32)}  # type: ignore[union-attr]
    tensors |= {"encoder": np.array([torch32.encoder]), **inputs.others_padded}
    for prefix, answers in (("torch32", torch32), ("torch64", torch64)):
        tensors |= {f"{prefix}.hidden.{i}": h.astype(np.float32) for i, h in enumerate(answers.hidden)}
        tensors[f"{prefix}.logits"] = answers.logits.astype(np.float32)
    tensors |= {f"gradient.{key}": g for key, g in torch32.gradients.items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file, {"format": FORMAT, "versions": json.dumps(versions)})


def check(path: str | Path, file: str | Path, **hub: Any) -> Report:
    """Our model against the answers that `record` stored. CheckpointError when the file is none of those."""
    from safetensors import SafetensorError, safe_open

    from jaxmodels.convert.hub import resolve

    try:
        with safe_open(file, framework="numpy") as stored:
            found = (stored.metadata() or {}).get("format")
            tensors = {key: stored.get_tensor(key) for key in stored.keys()} if found == FORMAT else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read as a safetensors file: {error}") from error
    if found != FORMAT:
        raise CheckpointError(f"{file} has format {found!r}, expected {FORMAT!r}: a file that `parity record` wrote")
    new = tensors["greedy"].shape[1]
    decoder = Inputs(tensors["decoder_input_ids"], tensors["decoder_attention_mask"]) if "decoder_input_ids" in tensors else None
    inputs = Inputs(tensors["input_ids"], tensors["attention_mask"], new, decoder=decoder)
    gradients = {key.removeprefix("gradient."): g for key, g in tensors.items() if key.startswith("gradient.")}

    def answers(prefix: str) -> Answers:
        n = sum(key.startswith(f"{prefix}.hidden.") for key in tensors)
        hidden = tuple(tensors[f"{prefix}.hidden.{i}"].astype(np.float64) for i in range(n))
        logits = tensors[f"{prefix}.logits"].astype(np.float64)
        return Answers(hidden, logits, tensors["greedy"], gradients, sum(tensors.get("encoder", ())))

    return compare(_ours(resolve(path, **hub), inputs, bool(gradients)), answers("torch32"), answers("torch64"))
