"""Prompts to token ids, and token ids to batches of bounded size.

Batches are padded on the right. In a causal model, states of real tokens do not depend on tokens to their right. So
padding needs no mask, changes no position, and its states are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymoe.architectures import DenseSpec, read_spec
from raymoe.architectures.dense_family import Scan
from raymoe.errors import CheckpointError, Problem, ProblemCollector, ProblemReport
from raymoe.object_store.options import StorageOptions
from raymoe.planning.owner import Owner
from raymoe.planning.plan import GatePrompts, PromptPlan
from raymoe.planning.prompt_checks import missing_row_problem
from raymoe.routers.plain_tokenizer import plain_prompt_tokenizer
from raymoe.sources.facts import SideFile
from raymoe.sources.hub import HubOptions
from raymoe.sources.prompt_sampling import NO_CHAT_TEMPLATE
from raymoe.sources.resolve import fetch_file
from raymoe.sources.tokenizer_files import (
    TokenizerFacts,
    tokenizer_code,
    tokenizer_facts,
    tokenizer_folder,
    tokenizer_guard,
    with_bos,
    with_one_bos,
)
from raymoe.storage.file_names import json_object
from raymoe.storage.source_reader import SourceReader
from raymoe.tensor_names import EMBEDDING

if TYPE_CHECKING:
    import torch

# Tokens of one batch, padding included. A constant: the content of a batch must not depend on the machine.
TOKEN_BUDGET = 2048
_PROMPTS_AT_ONCE = 256
# Some templates write today's date, by this function; results must not depend on the day.
_TEMPLATE_DAY = {"%d": "26", "%-d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%y": "24", "%Y": "2024", "%j": "208"}
_TEMPLATE_DAY |= {"%a": "Fri", "%A": "Friday", "%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM", "%Z": "UTC"}
_FIXED_DAY = "".join(
    ["{%- macro strftime_now(format) -%}{{ format"]
    + [f"|replace('{code}', '{text}')" for code, text in _TEMPLATE_DAY.items()]
    + [" }}{%- endmacro +%}"]
)


# The tokenizer that was loaded last, by its files and their state. All experts of a merge share one.
_tokenizers: dict[tuple[Any, ...], Any] = {}


def open_tokenizer(
    files: Sequence[SideFile], reader: SourceReader, *, trust_remote_code: bool, with_template: bool
) -> Any:
    """The tokenizer of these files. Raises ProblemReport if they are not a tokenizer."""
    paths = {side.name: reader.path(side.file) for side in files}
    key = (trust_remote_code, with_template, *((side, paths[side.name].stat().st_mtime_ns) for side in files))
    if key not in _tokenizers:
        tokenizer = prompt_tokenizer(paths, trust_remote_code=trust_remote_code, with_template=with_template)
        _tokenizers.clear()
        _tokenizers[key] = tokenizer
    return _tokenizers[key]


def prompt_tokenizer(paths: Mapping[str, Path], *, trust_remote_code: bool, with_template: bool) -> Any:
    """The tokenizer that reads prompts, with files at `paths`: without transformers if it would do the same.

    `with_template`: prompts are put into the chat template, which transformers does. Raises ProblemReport.
    """
    plain = None if with_template else plain_prompt_tokenizer(paths)
    return plain or tokenizer_from_paths(paths, trust_remote_code=trust_remote_code)


def tokenizer_from_paths(paths: Mapping[str, Path], *, trust_remote_code: bool) -> Any:
    """The tokenizer with files at `paths`, by their names in its model's folder. Raises ProblemReport."""
    with tokenizer_folder(paths) as folder:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer with files in `folder`."""
    from transformers import AutoTokenizer

    try:
        with tokenizer_guard(
            "base_model",
            "the base model's tokenizer can't be loaded",
            "gates from prompts need it; check the tokenizer files of base_model",
        ):
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except ProblemReport as report:
        settings = folder / "tokenizer_config.json"
        named = tokenizer_code(json_object(settings.read_bytes()) if settings.is_file() else {})
        if trust_remote_code or not any(named):
            raise
        what = "the base model's tokenizer has code of its own, which is not run unless you allow it"
        remedy = "give --trust-remote-code if you trust that code, or use gate_mode: random"
        raise ProblemReport([Problem(where="base_model", what=what, remedy=remedy)]) from report


def tokenize(
    tokenizer: Any, prompts: Sequence[str], *, vocab: int, owner: Owner | str, chat_template: bool = False
) -> list[list[int]]:
    """Token ids of each prompt, beginning with the tokenizer's BOS token (once), if it has one.

    With `chat_template`, a prompt is one user turn in the tokenizer's template, followed by the template's beginning of
    an answer. Raises ProblemReport for a missing template, a prompt without tokens or one with tokens that the model
    has no embedding for.
    """
    if chat_template and not tokenizer.chat_template:
        raise ProblemReport([NO_CHAT_TEMPLATE])
    bos = tokenizer.bos_token or ""
    ids: list[list[int]] = []
    problems: list[Problem] = []
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        some = prompts[start : start + _PROMPTS_AT_ONCE]
        if chat_template:
            whole = [with_one_bos(_apply_chat_template(tokenizer, prompt), bos) for prompt in some]
        else:
            whole = [with_bos(prompt, bos) for prompt in some]
        with tokenizer_guard(
            f"base_model: {owner}", "its tokenizer can't read the prompts", "check the tokenizer files of base_model"
        ):
            found = tokenizer(whole, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for number, (prompt, tokens) in enumerate(zip(some, found, strict=True), start + 1):
            where = f"{owner}, prompt {number} ({prompt[:40]!r})"
            problems += _token_problems(tokenizer, tokens, vocab, where)
        if problems:
            raise ProblemReport(problems)
        ids += found
    return ids


def prompt_ids(
    plan: PromptPlan, prompts: GatePrompts, reader: SourceReader, *, trust_remote_code: bool
) -> tuple[list[list[int]], list[list[int]], int | None]:
    """Token ids of the positive and the negative prompts, and the id of BOS. Raises ProblemReport for bad prompts."""
    tokenizer = open_tokenizer(
        plan.tokenizer_files, reader, trust_remote_code=trust_remote_code, with_template=prompts.chat_template
    )
    vocab = prompts.weights[EMBEDDING].entry.shape[0]
    positive, negative = (
        tokenize(tokenizer, texts, vocab=vocab, owner=prompts.owner, chat_template=prompts.chat_template)
        for texts in (prompts.positive, prompts.negative)
    )
    return positive, negative, tokenizer.bos_token_id if tokenizer.bos_token else None


def _apply_chat_template(tokenizer: Any, prompt: str) -> str:
    turn = [{"role": "user", "content": prompt}]
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _FIXED_DAY + template
        text: str = tokenizer.apply_chat_template(
            turn, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of its own
        what = f"its chat template can't be used: {(str(error) or type(error).__name__).splitlines()[0]}"
        remedy = "use a base model with a template that accepts one user turn, or leave chat_template out"
        raise ProblemReport([Problem(where="base_model", what=what, remedy=remedy)]) from error
    return text


def _token_problems(tokenizer: Any, tokens: Sequence[int], vocab: int, where: str) -> list[Problem]:
    if not tokens:
        return [Problem(where=where, what="it has no tokens", remedy="give it some text")]
    if (past := max(tokens)) >= vocab:
        return [missing_row_problem(where, past, str(tokenizer.convert_ids_to_tokens(past)), vocab)]
    return []


def prompt_problems(
    plan: PromptPlan,
    *,
    trust_remote_code: bool,
    hub: HubOptions | None = None,
    storage: StorageOptions | None = None,
) -> list[Problem]:
    """Problems of prompts and tokenizer, found before anything is written; otherwise actors would find them later.

    Prompts are checked for tokens without a row in the embedding, blank prompts for having any token, and a chat
    template is tried. Transformers, and so torch, are imported only if the tokenizer's files do not answer these
    questions. Files that only other nodes have are checked by actors there.
    """
    if not plan.needs_prompts:
        return []
    try:
        paths = {side.name: fetch_file(side.file, hub, storage) for side in plan.tokenizer_files}
        facts = tokenizer_facts(plan.tokenizer_files, lambda file: fetch_file(file, hub, storage).read_bytes())
    except CheckpointError:
        return []
    open_texts = [(member, texts) for member in plan.prompted for texts in _unchecked_texts(member, facts) if texts]
    if not open_texts:
        return []
    collector = ProblemCollector()
    with_template = any(member.chat_template for member, _ in open_texts)
    tokenizer = collector.run(prompt_tokenizer, paths, trust_remote_code=trust_remote_code, with_template=with_template)
    for member, texts in open_texts if tokenizer is not None else ():
        vocab = member.weights[EMBEDDING].entry.shape[0]
        collector.run(tokenize, tokenizer, texts, vocab=vocab, owner=member.owner, chat_template=member.chat_template)
    return list(dict.fromkeys(collector.problems))


def _unchecked_texts(member: GatePrompts, facts: TokenizerFacts) -> Iterator[Sequence[str]]:
    """An expert's prompts that only transformers can check."""
    may_pass = facts.may_exceed(member.weights[EMBEDDING].entry.shape[0])
    for texts in (member.positive, member.negative):
        if may_pass or (facts.bos is None and not member.chat_template and not all(texts)):
            yield texts
        elif member.chat_template:
            yield texts[:1]  # they differ only in their text


class Batch:
    """Right-padded prompts. `ids` (batch, length) int64; `lengths` (batch,) counts the real tokens of each row."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        import torch

        self.lengths = torch.tensor([len(row) for row in rows])
        self.ids: torch.Tensor = torch.zeros((len(rows), int(self.lengths.max())), dtype=torch.int64)
        for number, row in enumerate(rows):
            self.ids[number, : len(row)] = torch.tensor(row)


def batches(
    prompts: Sequence[Sequence[int]], budget: int = TOKEN_BUDGET, chunk: int = 1
) -> Iterator[list[Sequence[int]]]:
    """Prompts in groups whose padded size stays within `budget` tokens; a longer prompt goes alone.

    Sorted by length, so that there is little padding. A prompt counts as a multiple of `chunk` tokens, to which layers
    pad it.
    """
    for group in batch_numbers([len(prompt) for prompt in prompts], budget, chunk):
        yield [prompts[number] for number in group]


def batch_numbers(lengths: Sequence[int], budget: int, chunk: int) -> Iterator[list[int]]:
    """Like `batches`, from the lengths of the prompts: the prompts' numbers."""
    group: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and round_up(lengths[number], chunk) * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def round_up(length: int, chunk: int) -> int:
    """The next multiple of `chunk`."""
    return -(-length // chunk) * chunk


def chunk_size(config: Mapping[str, Any]) -> int:
    """The layers of a model with this config.json pad a sequence to a multiple of this number of tokens."""
    scan = read_scan(config)
    return scan.chunk if scan else 1


def read_scan(config: Mapping[str, Any]) -> Scan | None:
    """Memory of layers of linear attention or state spaces in a model with this config.json; None if it has none."""
    spec = read_spec(config, "")
    return spec.scan if isinstance(spec, DenseSpec) else None
