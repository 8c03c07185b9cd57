"""A model's chat template as text, rendered as transformers renders it."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from pause_ray.core.errors import ModelError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

_CONTEXT = "\ue0f0context\ue0f1"
"""Placeholder of the context, or the answer, while a template is rendered. Private-use characters survive every filter."""
_TODAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
"""The date in templates that show one (Llama 3.2's own default): prompts must not change from day to day."""
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and the token names it may use."""

    source: str
    names: Mapping[str, str]
    origin: str
    """The file that the template came from, for error messages."""

    @classmethod
    def find(cls, folder: Path, settings: Mapping[str, Any]) -> Self | None:
        """Return the template of a model folder with ``tokenizer_config.json`` as settings, or None; ``chat_template.jinja`` wins."""
        names = {name: _content(settings[name]) for name in _NAMED_TOKENS if settings.get(name) is not None}
        file = folder / "chat_template.jinja"
        if file.is_file():
            return cls(file.read_text(encoding="utf-8"), names, str(file))
        source = settings.get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return cls(source, names, str(folder / "tokenizer_config.json")) if isinstance(source, str) else None

    def render_around(self, system: str | None, user_before: str, user_after: str) -> tuple[str, str]:
        """Return the rendered chat before and after a context in the user's message, ready for the assistant's answer.

        Raises:
            ModelError: the template refuses these messages, or does not show the user's message exactly once.
        """
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": f"{user_before}{_CONTEXT}{user_after}"})
        parts = self._render(messages, add_generation_prompt=True).split(_CONTEXT)
        if len(parts) != 2:
            raise ModelError(f"{self.origin}: the chat template shows the user's message {len(parts) - 1} times, expected once")
        return parts[0], parts[1]

    def after_answer(self) -> str:
        """Return the text that the template writes after an assistant's answer.

        Raises:
            ModelError: the template refuses an assistant's message.
        """
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _CONTEXT}]
        return self._render(messages, add_generation_prompt=False).rpartition(_CONTEXT)[2]

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        import jinja2

        try:
            return _compiled(self.source).render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self.names
            )
        except jinja2.TemplateError as error:
            hint = "; if it knows no system message, set prompt.system to null" if messages[0]["role"] == "system" else ""
            raise ModelError(f"{self.origin}: the chat template cannot be rendered ({error}){hint}") from error


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> Template:
    """Compile and keep a template: compiling takes longer than rendering, and a sweep renders one template thousands of times."""
    return _environment().from_string(source)


def _environment() -> Environment:
    """Return the sandbox, switches, filters and functions that transformers gives to chat templates, with a fixed date."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.sandbox

    class GenerationBlock(jinja2.ext.Extension):
        """``{% generation %}`` marks answers for training masks; here it just shows its body."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        extensions=[GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _TODAY.strftime
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **settings: Any) -> str:  # noqa: FBT001, FBT002 (as templates call it)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **settings)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _content(token: Any) -> str:
    """Return a token's text; configurations write it plainly or as an object."""
    return str(token["content"] if isinstance(token, dict) else token)
