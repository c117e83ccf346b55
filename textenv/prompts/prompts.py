"""Prompts, and the lists, files and data sets that they are read from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np

from textenv.checks.lines import check_encodable, read_csv, read_json, read_lines, read_list
from textenv.prompts.chat import Message, is_chat, render_chat
from textenv.text.tokenizer import Tokenizer, encode_prompt

# A prompt as users write it: a text, a row of a data set, token ids, or the messages of a chat.
PromptLike = str | Mapping[str, Any] | Sequence[int] | Sequence[Message]
Order = Literal["shuffle", "sequential"]


class Prompt(str):
    """The text of a prompt, with the row of the data set that it comes from.

    It is a `str` in every respect; rewards read the attributes.

    Attributes:
        ids: The tokens that the model reads, read-only, (P,) int64: fewer than those of the text if it was truncated.
        row: The row of the data set; `{prompt_column: prompt}` for a bare text, list of token ids or chat.
        n_cut: The number of tokens by which it was truncated.
        messages: The messages of a chat, whose rendering is the text; None for any other prompt.
        references: The texts of the references column, a list; empty without that column.
        number: The index of the row in its source, or -1 for a prompt passed to `reset`.
        max_new_tokens: The row's own limit, in tokens, or None.

    Example:
        >>> prompt = Prompt("The film was", row={"prompt": "The film was", "label": 1})
        >>> prompt.upper(), prompt.row["label"]
        ('THE FILM WAS', 1)
    """

    ids: np.ndarray
    row: dict[str, Any]
    references: list[str]
    number: int
    max_new_tokens: int | None
    messages: list[Message] | None
    n_cut: int

    def __new__(
        cls,
        text: str = "",
        ids: Sequence[int] = (),
        row: dict[str, Any] | None = None,
        references: Sequence[str] = (),
        number: int = -1,
        max_new_tokens: int | None = None,
        messages: Sequence[Message] | None = None,
        n_cut: int = 0,
    ) -> Prompt:
        """Return the string, with its attributes."""
        prompt = super().__new__(cls, text)  # a str is immutable: `__init__` would be too late
        prompt.ids = np.array(ids, dtype=np.int64)
        prompt.ids.flags.writeable = False  # all episodes of the prompt share it
        prompt.row = {"prompt": text} if row is None else row
        prompt.references = list(references)
        prompt.number = number
        prompt.max_new_tokens = max_new_tokens
        prompt.messages = None if messages is None else list(messages)
        prompt.n_cut = n_cut
        return prompt


def read_rows(path: str | PathLike[str], encoding: str = "utf-8") -> list[Any]:
    """Read rows from a file: .jsonl (a JSON value a line), .json (a list), .csv (a header) or .txt (a text a line).

    Args:
        path: The file; its ending may be in upper case.
        encoding: The file's encoding, such as "gb18030", "utf-16" or "cp1252".

    Raises:
        ValueError: If the file does not exist, has another ending or another encoding, or has a line that is no JSON, a
            row with more cells than its header, or a line or cell of more than 4,000,000 characters; the message has
            its number.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "prompts.TXT"
        ...     n_bytes = file.write_bytes("你好".encode("gb18030"))
        ...     read_rows(file, encoding="gb18030")
        ['你好']
    """
    file = Path(fspath(path))
    if not file.is_file():
        raise ValueError(
            f"Expected `prompts` to be a list of prompts or the path of a .jsonl, .json, .csv or .txt file, got "
            f"{fspath(path)!r}, which is no file. A single prompt goes into a list: [{fspath(path)!r}]; a data set of "
            f"the Hugging Face hub is textenv.read_dataset({fspath(path)!r})."
        )
    suffix = file.suffix.lower()
    if suffix == ".csv":
        return read_csv(file, encoding)
    if suffix == ".json":
        return read_list(file, encoding)
    if suffix == ".txt":
        return [line for _, line in read_lines(file, encoding)]
    if suffix != ".jsonl":
        raise ValueError(f"Expected a file that ends in .jsonl, .json, .csv or .txt, got {fspath(path)!r}.")
    return [read_json(line, f"line {number} of {fspath(path)!r}") for number, line in read_lines(file, encoding)]


class PromptReader:
    """The reader that makes a `Prompt` of a text, row, list of token ids or chat, and cuts it to length.

    Args:
        tokenizer: The tokenizer, which encodes texts, decodes prompts that are token ids, and renders chats.
        prompt_column: The column of a row that holds the prompt: a text, token ids or the messages of a chat.
        references_column: The column that holds one reference, a text or a number, or a list of them.
        max_prompt_tokens: The most tokens of a prompt; None for no limit.
        truncation_side: The side on which a longer prompt is cut: "left" keeps its end, "right" its start, None
            raises. Special tokens that open the text (BOS) are kept in any case.

    Example:
        >>> from textenv import CharTokenizer
        >>> PromptReader(CharTokenizer("ab")).read({"prompt": "ab", "label": 1}).ids
        array([1, 2])
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_column: str = "prompt",
        references_column: str | None = None,
        max_prompt_tokens: int | None = None,
        truncation_side: Literal["left", "right"] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt_column = prompt_column
        self.references_column = references_column
        self.max_prompt_tokens = max_prompt_tokens
        self.truncation_side = truncation_side

    def read(self, source: PromptLike, number: int = -1) -> Prompt:
        """Return the `Prompt` of one text, row, list of token ids or chat.

        Args:
            source: The text, row, token ids or chat.
            number: The index of the prompt in its source, -1 if it has none.

        Raises:
            ValueError: If the prompt is empty or too long, lacks a column, has a token id outside the vocabulary or a
                lone surrogate, is a chat that cannot be rendered, or has a reference that is neither text nor number.
        """
        if isinstance(source, Prompt):  # its ids may be those of another env's tokenizer, so its row is read again
            source = source.row
        where = f"prompt {number}" if number >= 0 else "the prompt"
        row = dict(source) if isinstance(source, Mapping) else {self.prompt_column: source}
        value = self._column(row, self.prompt_column, where) if isinstance(source, Mapping) else source
        opening, body, text = self._encode(value, where)
        if not body:
            raise ValueError(f"Expected {where} to have at least one token, got {value!r}. Drop empty rows.")
        ids = self._fit(opening, body, where, text)
        return Prompt(
            text,
            ids=ids,
            row=row,
            references=self._references(row, where),
            number=number,
            max_new_tokens=self._own_limit(row, where),
            messages=value if is_chat(value) else None,
            n_cut=len(opening) + len(body) - len(ids),
        )

    def _column(self, row: Mapping[str, Any], column: str, where: str) -> Any:
        if column not in row:
            cure = " A chat is one prompt: a list of its messages." if "role" in row and "content" in row else ""
            raise ValueError(f"Expected {where} to have the column {column!r}, got the columns {list(row)}.{cure}")
        return row[column]

    def _encode(self, value: Any, where: str) -> tuple[list[int], list[int], str]:
        """Return the special tokens that open the prompt, its other tokens, and its text."""
        if isinstance(value, str):
            if not value:
                return [], [], value
            check_encodable(value, where)
            opening, body = encode_prompt(self.tokenizer, value)
            self._check_ids([*opening, *body], where)
            return opening, body, value
        if is_chat(value):
            return self._encode_chat(value, where)
        is_ids = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, bytes)
        if not is_ids or not all(isinstance(i, (int, np.integer)) for i in value):
            raise ValueError(f"Expected {where} to be a text, a list of token ids or of messages, got {value!r:.80}.")
        ids = [int(i) for i in value]
        self._check_ids(ids, where)
        return [], ids, self.tokenizer.decode(ids, skip_special_tokens=True)  # the user's ids are kept exactly

    def _encode_chat(self, messages: Sequence[Message], where: str) -> tuple[list[int], list[int], str]:
        """Return what `_encode` does; the template writes the opening tokens, so that no BOS is added."""
        text = render_chat(self.tokenizer, messages, where)
        check_encodable(text, where)
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        self._check_ids(ids, where)
        opening, body = encode_prompt(self.tokenizer, text)
        # The opening tokens are known only if the template wrote exactly those that the tokenizer would add.
        return (opening, body, text) if opening + body == ids else ([], ids, text)

    def _check_ids(self, ids: Sequence[int], where: str) -> None:
        vocabulary = len(self.tokenizer)
        for token in ids:
            if not 0 <= token < vocabulary:
                raise ValueError(f"Expected the token ids of {where} in [0, {vocabulary}), got {token}.")

    def _fit(self, opening: list[int], body: list[int], where: str, text: str) -> list[int]:
        """Return the tokens of a prompt, cut to `max_prompt_tokens`."""
        limit = self.max_prompt_tokens
        excess = 0 if limit is None else len(opening) + len(body) - limit
        if excess <= 0:
            return opening + body
        if excess >= len(body):
            raise ValueError(
                f"Expected max_prompt_tokens to leave room behind the {len(opening)} special tokens that open {where}, "
                f"got {limit}."
            )
        if self.truncation_side is None:
            raise ValueError(
                f"Expected {where} to have at most max_prompt_tokens={limit} tokens, got {len(opening) + len(body)}: "
                f"{text!r:.80}. Raise the limit, or cut with truncation_side='left' (keeps the end) or 'right'."
            )
        return opening + (body[excess:] if self.truncation_side == "left" else body[:-excess])

    def _references(self, row: Mapping[str, Any], where: str) -> list[str]:
        if self.references_column is None:
            return []
        value = self._column(row, self.references_column, where)
        is_list = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes))
        place = f"the column {self.references_column!r} of {where}"
        return [_reference(text, place) for text in (value if is_list else [value])]

    def _own_limit(self, row: Mapping[str, Any], where: str) -> int | None:
        value = row.get("max_new_tokens")
        if value in (None, ""):  # "" is an empty cell of a CSV file
            return None
        if not str(value).isdecimal() or int(value) < 1:
            raise ValueError(f"Expected the max_new_tokens of {where} to be an integer of at least 1, got {value!r}.")
        return int(value)


def _reference(value: Any, place: str) -> str:
    """Return a reference as a text; a number, such as the answer 42, is written as Python writes it."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not isinstance(value, str) and not (is_number and math.isfinite(value)):  # NaN is pandas' missing value
        raise ValueError(
            f"Expected texts or numbers as references in {place}, got {value!r:.80}: leave the row out, or give it a "
            "list without missing values."
        )
    text = str(value)
    check_encodable(text, place)
    return text


class PromptRows(Sequence[Prompt]):
    """The prompts of a source that is not in memory, such as a `datasets.Dataset`; a row is read when it is indexed.

    Args:
        rows: Any object with a length and rows by number.
        read: The function that makes a `Prompt` of a row and its number.
    """

    def __init__(self, rows: Sequence[PromptLike], read: Callable[[PromptLike, int], Prompt]) -> None:
        self.rows = rows
        self._read = read

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        """Return the prompt of a row, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # raises IndexError after the last row, which ends a `for` loop
        return self._read(self.rows[number], number)


def read_source(
    source: Sequence[PromptLike] | str | PathLike[str],
    read: Callable[[PromptLike, int], Prompt],
    encoding: str = "utf-8",
) -> tuple[Sequence[Prompt], int]:
    """Return the prompts of a list, a file or a data set, all of them checked, and the length of the longest in tokens.

    The prompts of a list or file are kept; a prompt of any other source is read again each time it is indexed.

    Args:
        source: The prompts, as for `TextEnv`.
        read: The function that makes a checked `Prompt` of a row and its number.
        encoding: The encoding of a file.

    Raises:
        ValueError: If the source is empty or has no length, or a prompt cannot work.
    """
    rows: Any = source
    if isinstance(source, (str, PathLike)):
        rows, read = read_rows(source, encoding), _naming_file(read, fspath(source))
    if isinstance(rows, Mapping):
        raise ValueError(f"Expected `prompts` to be a list of prompts, got one mapping: {rows!r:.80}.")
    if not isinstance(rows, Sized):
        raise ValueError(
            f"Expected `prompts` with a length and rows by number, got {type(rows).__name__}: make a list of it, "
            "or read a data set without streaming."
        )
    if len(rows) == 0:
        raise ValueError("Expected at least one prompt, got none.")
    prompts: Sequence[Prompt] = PromptRows(cast("Sequence[PromptLike]", rows), read)
    if isinstance(rows, (list, tuple)):
        prompts = list(prompts)
    return prompts, max(len(prompt.ids) for prompt in prompts)


def _naming_file(read: Callable[[PromptLike, int], Prompt], path: str) -> Callable[[PromptLike, int], Prompt]:
    """Return `read`, with the row and the file in the message of its errors."""

    def read_row(row: PromptLike, number: int) -> Prompt:
        try:
            return read(row, number)
        except ValueError as error:
            raise ValueError(f"{error} It is row {number + 1} of {path!r}.") from error

    return read_row
