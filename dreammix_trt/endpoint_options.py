"""Options of the commands that ask a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dreammix_trt.core.errors import InputError
from dreammix_trt.terminal import say

if TYPE_CHECKING:
    from dreammix_trt.core.chat import Chat

Endpoint = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Ask a model there: any OpenAI-compatible API, http://localhost:8000/v1."),
]
Model = Annotated[str | None, typer.Option(help="The model's name there.")]
KeyVariable = Annotated[
    str | None, typer.Option(help="The environment's variable with its key; default: OPENAI_API_KEY, if it is set.")
]
Timeout = Annotated[float | None, typer.Option(min=0.1, help="Seconds to wait for one answer; default: 120.")]
Deadline = Annotated[
    float | None, typer.Option(min=0.1, help="Seconds for everything, repeated attempts included; default: 300.")
]
#: the panel of these options in a command's help
PANEL = ("endpoint", "model", "key_variable", "timeout", "deadline")


def open_chat(endpoint: str | None, **asked: Any) -> Chat | None:
    """The model behind an endpoint; None where none is named.

    asked: the other options, as they were given; None: not given.

    Raises InputError for options without an endpoint, and an endpoint without a model.
    """
    from dreammix_trt.core.chat import Chat

    given = {name: value for name, value in asked.items() if value is not None}
    if endpoint is None:
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(f"{names}: only with --endpoint URL; leave out or name the endpoint")
        return None
    if "model" not in given:
        raise InputError("--model is missing: name the model as the endpoint calls it, for example: qwen2.5-vl-7b")
    return Chat(endpoint, **given)


def tell_tokens(chat: Chat | None) -> None:
    """Say what the model's answers cost, as its server counts."""
    if chat is not None and any(chat.tokens):
        say(f"{chat.url}: {chat.tokens[0]:,} tokens read and {chat.tokens[1]:,} written, as it counts")
