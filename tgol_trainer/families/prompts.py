"""Count prompts that are cut, and shorten those that are far too long before anything reads their tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tgol_trainer._quiet import Without

_CHARACTERS, _MARGIN = 16, 4


def seen_part(prompt: str, limits: Sequence[tuple[Any, int]]) -> str:
    """
    Return the beginning of a prompt that holds every token that the text encoders see, and several times as many.

    Tokenizers read a text to its end before they cut it, and diffusers then logs the rest: 7 s for a megabyte, at each
    step. The cut is made between words, which tokenizers treat one by one, so that the tokens before it stay the same.

    Args:
        prompt (`str`): Any text; one of at most 16 signs for each token comes back as it is.
        limits (`Sequence[tuple[tokenizer, int]]`): Tokenizers and the number of tokens that each of them may give.

    Returns:
        `str`: the prompt, or its beginning.
    """
    size = _CHARACTERS * max(limit for _, limit in limits)
    while size < len(prompt):
        part = prompt[:size].rsplit(None, 1)[0] if prompt[:size].strip() else prompt[:size]
        if len(part) < size and all(_num_tokens(tokenizer, part) > _MARGIN * limit for tokenizer, limit in limits):
            return part
        size *= 2
    return prompt


@contextmanager
def counted_cuts(pipeline: Any) -> Iterator[None]:
    """Silence, for a block, what a pipeline logs of each prompt that it cuts; these are counted."""
    loggers = [logging.getLogger(each.__module__) for each in type(pipeline).__mro__]
    without = Without("The following part of your input was truncated")
    for logger in loggers:
        logger.addFilter(without)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(without)


def words_of(tokenizer: Any) -> Any:
    """Return the tokenizer inside a processor of text and images, or the tokenizer itself."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def template_room(tokenizer: Any, limit: int, messages: Any = None, **options: Any) -> int:
    """
    Return how many of `limit` tokens are left to a prompt inside the chat template of a language model.

    Args:
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`): What has the template.
        limit (`int`): Tokens of template and prompt.
        messages (`list[dict]`, *optional*):
            The conversation around an empty prompt; by default a user's empty message.
        options (`dict`): Passed to `apply_chat_template`, as the pipeline does.

    Returns:
        `int`: tokens of a prompt, which itself is counted without the template.
    """
    text = tokenizer.apply_chat_template(messages or [{"role": "user", "content": ""}], tokenize=False, **options)
    return limit - _num_tokens(words_of(tokenizer), text)


def count_cut_prompts(prompts: Sequence[str], limits: Sequence[tuple[Any, int]]) -> tuple[int, int]:
    """
    Count the prompts that at least one tokenizer cuts, and return the smallest limit too.

    `limits` are tokenizers and the number of tokens that each of them may give, special ones included.
    """
    prompts = [seen_part(prompt, limits) for prompt in prompts]
    cut: set[int] = set()
    for tokenizer, limit in limits:
        encoded = tokenizer(prompts, truncation=False, verbose=False).input_ids
        cut |= {index for index, ids in enumerate(encoded) if len(ids) > limit}
    return len(cut), min(limit for _, limit in limits)


def _num_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, truncation=False, verbose=False).input_ids)
