"""Chat rendering: token ids and loss mask made together, from the model's own chat template, for every back-end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stakelib.run import CourseError

PROMPT, ANSWER = "\u27e6prompt\u27e7", "\u27e6answer\u27e7"  # sentinels that no template contains


@dataclass(frozen=True)
class Template:
    """What the chat template puts around one exchange: before + prompt + between + answer + end (+ the rest)."""

    before: str  # begins with the BOS token where the model has one
    between: str
    end: str  # the end-of-turn token


@dataclass(frozen=True)
class Rendered:
    """One training row as token ids; `mask[i]` is 1 where id i is learned (the answer and its end-of-turn token)."""

    ids: list[int]
    mask: list[int]
    where: str = field(default="", compare=False)  # file and line, or id: what a message about the row says

    @property
    def prompt_ids(self) -> list[int]:
        """The ids that are given, not learned."""
        return self.ids[: self.mask.index(1)] if 1 in self.mask else self.ids


def template(tokenizer: Any) -> Template:
    """Take the tokenizer's chat template apart by rendering it around two sentinels.

    Raises CourseError if the template does not keep the two texts or ends the answer with no special token.
    """
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        opening = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        before, rest = text.split(PROMPT)
        between, after = rest.split(ANSWER)
    except (ValueError, TypeError, TemplateError) as problem:
        raise CourseError(
            f"the chat template cannot be used: {problem}", "choose a model of the list with --model"
        ) from problem
    # all_special_tokens holds the named ones only (bos, eos...), and Gemma 3 gives its end of turn no name
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    control = [*tokenizer.all_special_tokens, *added]
    end = next((t for t in control if after.startswith(t)), None)
    if end is None or opening != before + PROMPT + between:
        raise CourseError(
            [f"the chat template ends an answer with {after!r}", f"and opens one with {opening!r}"],
            "choose a model of the list with --model",
        )
    return Template(before, between, end)


def render(tokenizer: Any, prompt: str, completion: str | None = None) -> Rendered:
    """ids and loss mask of one exchange; without a completion, the ids that ask for one.

    The template's own pieces may become control tokens, the two texts never do: a scenario called "<end_of_turn>"
    stays text. Raises CourseError for an empty completion and unless a BOS that the template writes stands once.
    """
    around = template(tokenizer)
    ids = _control(tokenizer, around.before) + _text(tokenizer, prompt) + _control(tokenizer, around.between)
    if completion is None:
        return Rendered(ids, [0] * len(ids))
    answer = _text(tokenizer, completion)
    if not answer:
        raise CourseError("the completion is empty: nothing to learn", "remove the row or write an answer")
    end = tokenizer.convert_tokens_to_ids(around.end)
    whole = Rendered([*ids, *answer, end], [0] * len(ids) + [1] * (len(answer) + 1))
    written, found = around.before.count(tokenizer.bos_token or "\0"), whole.ids.count(tokenizer.bos_token_id)
    if written == 1 and found != 1:
        raise CourseError(f"{found} BOS tokens in one row", "report this model")
    return whole


def stop_ids(tokenizer: Any) -> list[int]:
    """Ids that end an answer: end-of-text and the template's end-of-turn, which in Gemma is not the EOS."""
    return sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(template(tokenizer).end)})


def _control(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _text(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True).input_ids
