"""What a prompt contradicts of a subject, asked of a language model, as the paper does (3.4)."""

from __future__ import annotations

from typing import Any, Final

from dreammix_trt.core.answers import ask_for_json
from dreammix_trt.core.chat import Chat
from dreammix_trt.core.errors import EndpointError, InputError, TimedOut
from dreammix_trt.core.vocabulary import split_words
from dreammix_trt.engine.retrieval import DULL, Attributes, Retrieval

_REMEDY: Final = "name the words yourself"
_WITHOUT: Final = "without --endpoint the words' own classes decide, and nobody is asked"


class EndpointRetriever:
    """A `Retriever` that sends the prompt and the attributes, and no picture, to a model behind an endpoint.

    chat: where it is asked; its `tokens` say what that cost, and its deadline begins with the first question.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def __call__(self, prompt: str, attributes: Attributes, class_name: str, token: str) -> Retrieval:
        """The words of the attributes that the model names, each with a reason.

        Words that the prompt says itself, the class and the token are never taken out.

        Raises EndpointError for a model that names others twice, and as `Chat.ask` does: a picture that was asked for
        in one way is not painted in another.
        """
        kept = {token.lower(), *split_words(class_name), *split_words(prompt), *DULL}
        choices = {
            word: f"{kind} {value!r}"
            for kind, values in attributes.items()
            for value in values
            for word in split_words(value)
            if word not in kept
        }
        if not choices:
            return Retrieval((), ("nothing is taken out: the prompt says every word of the subject's attributes",))

        def read(record: dict[str, Any]) -> set[str]:
            named = record.get("words")
            if not isinstance(named, list) or not all(isinstance(word, str) for word in named):
                raise InputError('your answer has no list of texts under "words"')
            words = {word.strip().lower() for word in named}
            if strange := sorted(words - choices.keys()):
                raise InputError(f"{strange[0]!r} cannot be taken out; choose of {', '.join(choices)}")
            return words

        question = _question(prompt, attributes, class_name or "thing", token, list(choices))
        try:
            found = ask_for_json(self.chat, question, "contradicted", _schema_of(list(choices)), read, _REMEDY)
        except (EndpointError, TimedOut) as error:
            raise type(error)(f"{error}; {_WITHOUT}") from error
        words = tuple(word for word in choices if word in found)
        says = f"{self.chat.model} says that the prompt contradicts"
        reasons = [f"{word!r} of {choices[word]} is taken out: {says} it" for word in words]
        return Retrieval(words, tuple(reasons or [f"nothing is taken out: {says} none of the subject's attributes"]))


def _schema_of(choices: list[str]) -> dict[str, Any]:
    """Of the answer."""
    words = {"type": "array", "items": {"type": "string", "enum": choices}}
    return {"type": "object", "properties": {"words": words}, "required": ["words"], "additionalProperties": False}


def _question(prompt: str, attributes: Attributes, class_name: str, token: str, choices: list[str]) -> str:
    listed = "\n".join(f"- {kind}: {', '.join(values)}" for kind, values in attributes.items())
    return (
        f"A picture shows one certain {class_name}, which prompts call {token!r}. It has these attributes:\n{listed}\n"
        f"It is to be painted anew by the prompt {prompt!r}.\n"
        "Which words of its attributes does this prompt contradict, because it asks for something else in their place, "
        f"of the {class_name} itself or of the same part? A red {class_name} contradicts blue, not glossy; what the "
        f"prompt says of the surroundings contradicts nothing. Choose of these words: {', '.join(choices)}.\n"
        'Answer with one JSON object and nothing else, such as {"words": ["blue"]}; an empty list where nothing is '
        "contradicted."
    )
