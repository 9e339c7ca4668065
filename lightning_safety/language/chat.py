# SPDX-License-Identifier: Apache-2.0
"""From prompts and responses to tokens, by the tokenizer's chat template.

Text from data is data: a response that contains ``<|im_end|>`` or ``<|im_start|>system`` is tokenised as these
characters and forges no turn. For all other text the result is what ``apply_chat_template(tokenize=True)`` gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_safety.arguments import check_positive
from lightning_safety.data.collator import IGNORED_LABEL, TokenizedExample
from lightning_safety.language.plain_text import Piece, Token, moved, tokenize, tokenize_spans
from lightning_safety.language.template import Frame, chat_frame, frame_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS_SHOWN = 60


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    r"""Tokenise a user turn and the opening of the assistant's turn.

    Args:
        tokenizer: With a chat template.
        prompt: What the user says. Special tokens in it are plain text.

    Returns:
        The tokens from which a reply is generated.

    Raises:
        TypeError: `prompt` is not text.
        ValueError: The tokenizer has no chat template, or its template loses or repeats the prompt.

    Example:
        >>> from tests.tiny import make_tiny_tokenizer
        >>> tokenizer = make_tiny_tokenizer()
        >>> tokenizer.decode(encode_prompt(tokenizer, "Hello"))
        '<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n'
    """
    _check_text("prompt", prompt, prompt)
    frame = chat_frame(tokenizer, turns=1)
    return tokenize(tokenizer, frame_pieces(frame, [prompt]), frame.controls)


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    response: str,
    *,
    max_length: int | None = None,
    end_turn: bool = True,
) -> TokenizedExample:
    """Tokenise a user turn and the assistant's response. Learned are the response and the token that ends it.

    What the template writes after the end-of-turn token (a line break, say) is in the tokens but not learned.

    Args:
        tokenizer: With a chat template.
        prompt: What the user says. Special tokens in it are plain text.
        response: What the assistant says. Special tokens in it are plain text.
        max_length: At most so many tokens: the end of the response is cut, and a response that is cut does not end its
            turn. The prompt is never cut.
        end_turn: False: nothing follows the response, as for an opening that goes on.

    Returns:
        Tokens and labels. Where the template ends a turn with no special token, the end-of-text token follows the
        response.

    Raises:
        TypeError: The prompt or the response is not text.
        ValueError: The tokenizer has no chat template, or one that loses or repeats the text; the response is blank; or
            `max_length` leaves no token of it (the message names the row).

    Example:
        >>> from tests.tiny import make_tiny_tokenizer
        >>> tokenizer = make_tiny_tokenizer()
        >>> example = encode_example(tokenizer, "Hello", "I cannot.")
        >>> tokenizer.decode([label for label in example.labels if label != -100])
        'I cannot.<|im_end|>'
    """
    _check_text("prompt", prompt, prompt)
    _check_text("response", response, prompt)
    frame = chat_frame(tokenizer, turns=2)
    pieces = frame_pieces(frame, [prompt, response])
    if not pieces[3].text.strip():
        raise ValueError(f"`response` expected to be text but is blank for the prompt {_shorten(prompt)}.")
    closing = frame.controls.search(frame.texts[2])
    token_ids, start = _encode_after(tokenizer, pieces[:3], pieces[3:] if end_turn and closing else pieces[3:4], frame)
    end = len(token_ids)
    if end_turn and closing:
        closing_id = tokenizer.convert_tokens_to_ids(closing.group())
        # From the right: the count of it in the template's text is known, whatever the response is made of.
        ends = [index for index, token_id in enumerate(token_ids) if token_id == closing_id]
        end = ends[-_count(frame, closing.group())] + 1
    elif end_turn:
        token_ids.append(end_of_turn_id(tokenizer))
        end += 1
    labels = [IGNORED_LABEL] * start + token_ids[start:end] + [IGNORED_LABEL] * (len(token_ids) - end)
    if max_length is not None and check_positive(max_length, "max_length") <= start:
        raise ValueError(
            f"`max_length` expected to leave room for the response but got {max_length} where the prompt alone takes "
            f"{start} tokens: {_shorten(prompt)}. Raise `max_length` or drop the row."
        )
    return TokenizedExample(token_ids[:max_length], labels[:max_length])


def tokenize_reply(tokenizer: PreTrainedTokenizerBase, prompt: str, reply: str) -> tuple[list[Token], int]:
    """Tokenise a user turn and a reply that may go on, as `encode_example` does with ``end_turn=False``.

    Returns:
        All tokens, and how many of them come before the reply. Their spans count from the beginning of the reply, as
        the template trims it: those of the prompt are negative.
    """
    frame = chat_frame(tokenizer, turns=2)
    pieces = frame_pieces(frame, [prompt, reply])
    before, after = pieces[:3], pieces[3:4]
    length = sum(len(piece.text) for piece in before)
    token_ids, start = _encode_after(tokenizer, before, after, frame)
    tokens = tokenize_spans(tokenizer, [*before, *after], frame.controls)
    if [token.id for token in tokens] != token_ids:  # tokenised apart
        first, second = (tokenize_spans(tokenizer, part, frame.controls) for part in (before, after))
        tokens = first + moved(second, length)
    return moved(tokens, -length), start


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends the assistant's turn: the template's, else the end of text.

    Raises:
        ValueError: There is neither, or the chat template cannot be used.
    """
    frame = chat_frame(tokenizer, turns=2)
    closing = frame.controls.search(frame.texts[2])
    token_id = tokenizer.convert_tokens_to_ids(closing.group()) if closing else tokenizer.eos_token_id
    if token_id is None:
        raise ValueError(
            "`tokenizer` expected to have an end-of-text token, as its chat template ends a turn with no special token "
            'of its own, but has none. Set one, for instance `tokenizer.eos_token = "</s>"`.'
        )
    return int(token_id)


def _encode_after(
    tokenizer: PreTrainedTokenizerBase, before: list[Piece], after: list[Piece], frame: Frame
) -> tuple[list[int], int]:
    """Tokenise both, and return the tokens and how many of them are the first part's.

    Where a token would reach across the boundary (a response that begins with a line break), the two are tokenised
    apart: then what precedes the response is what precedes a generated reply.
    """
    first = tokenize(tokenizer, before, frame.controls)
    whole = tokenize(tokenizer, [*before, *after], frame.controls)
    if whole[: len(first)] != first:
        whole = first + tokenize(tokenizer, after, frame.controls)
    return whole, len(first)


def _count(frame: Frame, control: str) -> int:
    return sum(match.group() == control for match in frame.controls.finditer(frame.texts[2]))


def _check_text(argument: str, value: object, prompt: object) -> None:
    if not isinstance(value, str):
        row = "" if value is prompt else f" for the prompt {_shorten(prompt)}"
        raise TypeError(f"`{argument}` expected to be text but got {type(value).__name__}{row}.")


def _shorten(text: object) -> str:
    shown = str(text)
    return repr(shown if len(shown) <= _CHARACTERS_SHOWN else shown[:_CHARACTERS_SHOWN] + "…")
