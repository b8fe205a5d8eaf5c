"""Chat templates: a conversation as the text, and the tokens, that a model was trained on.

A template comes with a checkpoint and is untrusted code. It runs in Jinja's immutable sandbox and sees only plain
strings, numbers, lists and dictionaries, never the caller's objects."""

from __future__ import annotations

import contextvars
import dataclasses
import datetime
import inspect
import json
import re
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np

from jaxmodels.processing.sanitize import encode_marked, mark, patterns
from jaxmodels.processing.schema import get_json_schema

Message = Mapping[str, Any]
Tool = Mapping[str, Any] | Callable
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning; the first is the standard one
END = "<END OF THE FINAL MESSAGE> "  # marks where an open final message stops; its last space tells whether the template strips

# While a render wants to know which text lies in {% generation %} blocks: random marks written before and after each of them.
_generation_marks: contextvars.ContextVar[tuple[str, str]] = contextvars.ContextVar("_generation_marks", default=("", ""))


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: text that the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        begin, end = _generation_marks.get()
        return f"{begin}{caller()}{end}"


class _Dict:
    """`dict(...)` in a template, without the type object that leads out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` in a template; names with a leading underscore would reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # self is positional-only, so that a template may write namespace(self=...)
        for name in dict(*args[1:], **kwargs):
            _public(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        jinja2.utils.Namespace.__setitem__(self, _public(name), value)


def _public(name: Any) -> Any:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a chat template may not set {name!r} on a namespace: a name must not begin with an underscore")
    return name


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes HTML characters, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache
def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The sandbox that templates run in."""
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = _tojson
    sandbox.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    sandbox.globals |= {"dict": _Dict(), "namespace": _Namespace}
    return sandbox


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    try:
        return environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        error.args = (f"the chat template is not valid Jinja: line {error.lineno}: {error.message}",)
        raise
    except SyntaxError as error:  # what Jinja leaves to Python, such as a break outside a loop
        raise jinja2.TemplateError(f"the chat template is not valid Jinja: {error.msg}") from None


def _plain(value: Any) -> Any:
    """The value rebuilt from JSON's types, so that a template can call no method of the caller's objects."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):  # subclasses (enums, numpy's scalars) bring methods of their own
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"  # images, arrays: templates only ask whether they are there


def _messages(chat: Any) -> list[dict[str, Any]]:
    """A conversation as plain dictionaries; keys whose value is None are left out, since templates would print "None"."""
    messages = []
    for given in getattr(chat, "messages", chat):
        message = _plain(given)
        if not isinstance(message, dict):
            raise TypeError(f"a message is a dictionary with 'role' and 'content', found {str(given)[:80]!r} ({type(given).__name__})")
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[name] for name in REASONING if name in message), None)
        messages.append(message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning})
    return messages


def _open_end(messages: list[dict[str, Any]], field: str, template: str) -> str:
    """Append END to the final message's `field`; returns the text that it ends."""
    if not messages:
        raise ValueError("continue_final_message: the conversation is empty; there is no final message")
    content = messages[-1].get(field)
    if content is None:
        raise ValueError(f"continue_final_message: the final message has no {field!r}, only {', '.join(map(repr, messages[-1]))}")
    copies = [name for name in REASONING if messages[-1].get(name) == content] if field in REASONING else [field]
    if not any(name in template for name in copies):
        raise ValueError(f"continue_final_message={field!r}: the chat template does not use this field")
    if isinstance(content, (list, tuple)):
        block = next((block for block in reversed(content) if isinstance(block, dict) and isinstance(block.get("text"), str)), None)
        if block is None:
            raise ValueError("continue_final_message: the final message's content holds no text to continue")
        content, block["text"] = block["text"], block["text"] + END
    elif isinstance(content, str):
        messages[-1] |= dict.fromkeys(copies, content + END)
    else:
        raise ValueError(
            f"continue_final_message: the final message's {field!r} is {content!r}; expected text, or a list of blocks with text"
        )
    return content


def _cut_open_end(text: str, content: str) -> str:
    at = text.rfind(END.strip())
    if at < 0 or content.strip() not in text:
        raise ValueError(
            f"continue_final_message: the template does not write the final message as given, so it cannot stay open; "
            f"the message: {content.strip()[:200]!r}, the rendered chat: {text[-400:]!r}"
        )
    if END.strip() in text[:at]:
        raise ValueError("continue_final_message: the template writes the final message more than once, so it cannot stay open")
    return text[:at] if text[at : at + len(END)] == END else text[:at].rstrip()


def render(
    template: str, chat: Any, variables: Mapping[str, Any], *, continue_final_message: bool | str = False, generation: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """One conversation as text, and the (start, end) of its {% generation %} blocks in characters if asked for."""
    messages = _messages(chat)
    content = None
    if continue_final_message:
        content = _open_end(messages, continue_final_message if isinstance(continue_final_message, str) else "content", template)
    name = secrets.randbelow(10**18)  # digits: no filter on case changes them
    marks = (f"\ufdd0{name}\ufdd1", f"\ufdd0{name}\ufdd2") if generation else ("", "")
    token = _generation_marks.set(marks)
    try:
        text = _compile(template).render(messages=messages, **_plain(variables))
    finally:
        _generation_marks.reset(token)
    if content is not None:
        text = _cut_open_end(text, content)
    return _spans(text, *marks) if generation else (text, [])


def _spans(marked: str, begin: str, end: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the (start, end) of what the outermost pairs enclose."""
    text, spans, start, depth = "", [], 0, 0
    for piece in re.split(f"({begin}|{end})", marked):
        if piece == begin and (depth := depth + 1) == 1:
            start = len(text)
        elif piece == end and (depth := depth - 1) == 0:
            spans.append((start, len(text)))
        elif piece not in (begin, end):
            text += piece
    return text, spans


def _schemas(tools: Sequence[Tool] | None) -> list | None:
    if tools is None:
        return None
    if isinstance(tools, (Mapping, str)) or not hasattr(tools, "__iter__"):
        raise TypeError(f"tools: expected a list of functions or JSON schemas, found {type(tools).__name__}")
    tools = list(tools)
    for tool in tools:
        if not isinstance(tool, Mapping) and not inspect.isfunction(tool) and not inspect.ismethod(tool):
            raise ValueError(f"a tool is a function with type hints and a docstring, or a JSON schema; found {type(tool).__name__}")
    return [tool if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools]


def read_template(value: Any, where: str = "chat_template") -> str | dict[str, str] | None:
    """A template, or several by name; also from the list of {"name", "template"} that tokenizer_config.json may store.

    ValueError, which names `where`, if it is none of these."""
    found = value
    if isinstance(value, (list, tuple)) and all(isinstance(entry, Mapping) and {"name", "template"} <= entry.keys() for entry in value):
        found = {entry["name"]: entry["template"] for entry in value}
    texts = list(found.values()) if isinstance(found, Mapping) else [found]
    if found is not None and not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{where}: found {str(value)[:80]!r}; expected a Jinja template, or several as {{name: template}} or "
            '[{"name": ..., "template": ...}]'
        )
    return found


class ChatTemplates:
    """The part of a tokenizer that formats conversations; see `Tokenizer`."""

    chat_control_tokens: list[str] | None
    special_tokens_map: Any  # these three by Vocabulary
    added_tokens_encoder: Any
    added_tokens_decoder: Any
    _chat_template: str | dict[str, str] | None

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The Jinja template, or several by name ("default", "tool_use", "rag", ...)."""
        return self._chat_template

    @chat_template.setter
    def chat_template(self, value: Any) -> None:
        self._chat_template = read_template(value)

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Tool] | None = None) -> str:
        """The template text that `apply_chat_template` would use: by name, as given, or the checkpoint's.

        Of several the one named "tool_use" serves calls with tools, "default" all others."""
        known = self.chat_template
        if isinstance(known, dict):
            if chat_template is not None:
                return known.get(chat_template, chat_template)
            name = "tool_use" if tools is not None and "tool_use" in known else "default"
            if name not in known:
                raise ValueError(f"this tokenizer has several chat templates and no default; pass chat_template= one of {sorted(known)}")
            return known[name]
        if chat_template is None and known is None:
            raise ValueError(
                "this tokenizer has no chat template (base models often have none); pass chat_template= a Jinja template or set "
                "tokenizer.chat_template"
            )
        return chat_template if chat_template is not None else str(known)

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = False,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = "np",
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Format a conversation, or a batch of them, as the model expects it.

        Args:
            conversation: messages {"role": ..., "content": ...}, or a list of conversations.
            tools: Python functions (type hints and a Google-style docstring) or JSON schemas.
            documents: dictionaries with "title" and "text", for templates that ground answers in them.
            chat_template: a Jinja template, or the name of one of the tokenizer's.
            add_generation_prompt: end with what opens the assistant's turn.
            continue_final_message: leave the final message open, so that the model goes on with it; a string names the field to
                leave open instead of "content".
            tokenize: False gives the text (a list for a batch).
            sanitize_control_tokens: encode special tokens in messages, tools, documents and variables as ordinary text, so that
                only those of the template count.
            padding, truncation, max_length, return_tensors: as for calling the tokenizer.
            return_dict: False gives only the ids.
            return_assistant_tokens_mask: add `assistant_masks` [B, T], 1 for tokens that overlap a {% generation %} block.
            tokenizer_kwargs: further options of the tokenizer call.
            kwargs: further variables of the template; they win over the special tokens (`bos_token`, ...), which it sees too.

        Returns a BatchEncoding, ids, or text, by the options above."""
        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise ValueError("return_assistant_tokens_mask needs return_dict=True and tokenize=True")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message keeps the last turn open, add_generation_prompt opens a new one; choose one")
        if return_assistant_tokens_mask and (continue_final_message or sanitize_control_tokens):
            raise ValueError("return_assistant_tokens_mask goes with neither continue_final_message nor sanitize_control_tokens")
        if sanitize_control_tokens and not tokenize:
            raise ValueError("sanitize_control_tokens changes tokens, not text: it needs tokenize=True")
        template = self.get_chat_template(chat_template, tools)
        if isinstance(conversation, (list, tuple)) and not conversation:
            raise ValueError("the conversation is empty; a template needs at least one message")
        first: Any = conversation[0] if isinstance(conversation, (list, tuple)) else None
        batched = isinstance(first, (list, tuple)) or hasattr(first, "messages")
        chats: list[Any] = list(conversation) if batched else [conversation]
        if not isinstance(documents or (), (list, tuple)) or any(not isinstance(document, Mapping) for document in documents or ()):
            raise TypeError("documents: expected a list of dictionaries with 'title' and 'text'")
        if return_assistant_tokens_mask and not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            warnings.warn("return_assistant_tokens_mask: the chat template has no {% generation %} block, the mask is all 0", stacklevel=2)

        inputs: Any = {"tools": _schemas(tools), "documents": documents, **kwargs}
        if sanitize_control_tokens:
            control, _ = patterns(self._control_tokens(template))
            chats = [mark([_plain(m) for m in getattr(chat, "messages", chat)], control) for chat in chats]
            inputs = mark(_plain(inputs), control)
        variables = {**self.special_tokens_map, "add_generation_prompt": add_generation_prompt, **inputs}
        options: dict[str, Any] = {"continue_final_message": continue_final_message, "generation": return_assistant_tokens_mask}
        rendered = [render(template, chat, variables, **options) for chat in chats]
        texts = [text for text, _ in rendered]
        if not tokenize:
            return texts if batched else texts[0]

        options = {"padding": padding, "truncation": truncation, "max_length": max_length, "return_tensors": return_tensors}
        options |= {"add_special_tokens": False, **(tokenizer_kwargs or {})}
        if sanitize_control_tokens:
            encoded = encode_marked(self, texts if batched else texts[0], **options)
        else:
            encoded = self(texts if batched else texts[0], **options)  # type: ignore[operator]
        if return_assistant_tokens_mask:
            masks: Any = [_token_mask(row, spans) for row, (_, spans) in zip(encoded.encodings, rendered, strict=True)]
            encoded["assistant_masks"] = masks[0] if return_tensors is None and not batched else masks
            encoded.convert(return_tensors)
        return encoded if return_dict else encoded["input_ids"]

    def _control_tokens(self, template: str) -> tuple[str, ...]:
        """Tokens that `sanitize_control_tokens` takes from the user's text: all special ones, and the added ones that
        `chat_control_tokens` lists or, without such a list, the template writes."""
        if self.chat_control_tokens is not None:
            listed = set(self.chat_control_tokens)
        else:
            literals = _literals(template)
            listed = {token for token in self.added_tokens_encoder if token in literals and not token.isspace()}
        return tuple(token.content for token in self.added_tokens_decoder.values() if token.special or token.content in listed)


@lru_cache(maxsize=64)
def _literals(template: str) -> str:
    """The text that a template writes itself, separated by characters that stand in no token."""
    tree = environment().parse(template)
    texts = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    texts |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return "\0".join(texts)


def _token_mask(row: Any, spans: list[tuple[int, int]]) -> list[int]:
    """1 for each token with a character in a span; an empty token (a stripped space) counts if it lies inside."""
    mask = [0] * len(row.ids)
    for i, (start, end) in enumerate(row.offsets):
        if any((start < b and end > a) or (start == end and a < start <= b) for a, b in spans):
            mask[i] = 1
    return mask
