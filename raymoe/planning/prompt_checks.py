"""Finds problems of a plan's prompts before anything is written.

It checks their tokens, as far as the tokenizer's files show them, and their number, by the measured tables of
docs/research/routing.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from raymoe.errors import Problem, ProblemReport
from raymoe.formatting import short_list
from raymoe.gate_modes import MODES, better_mode
from raymoe.planning.plan import GatePlan, GatePrompts, MomentPlan, PromptPlan
from raymoe.sources.tokenizer_files import TokenizerFacts, with_bos
from raymoe.tensor_names import EMBEDDING

# The measurements are for 5 and 16 prompts. Fewer than this are closer to 5.
_FEW = 8
_NAMED = 5


def prompt_checks(plan: PromptPlan, tokenizer: TokenizerFacts) -> tuple[list[Problem], list[str]]:
    """(problems, warnings) of prompts. Problems: a tokenizer or a text that can't be read, a prompt without tokens, a
    token that the embedding has no row for. Warnings: prompts that are too long."""
    problems: list[Problem] = []
    warnings: list[str] = []
    try:
        encode = tokenizer.encoder()
        for member in plan.members:
            problems += _without_tokens(plan, member, tokenizer.bos)
            rows, limit = _rows(member), _limit(plan, member)
            if encode and member.positive and (tokenizer.may_exceed(rows) or any(_length_bounds(member, limit))):
                found, long = _encoded(member, tokenizer, encode, limit)
                problems += found
                warnings += long
    except ProblemReport as report:
        return [*problems[:_NAMED], *report.problems], warnings
    if len(problems) > _NAMED:
        problems[_NAMED:] = [Problem(where="prompts", what=f"and {len(problems) - _NAMED} more such prompts")]
    return problems, warnings


def _without_tokens(plan: PromptPlan, member: GatePrompts, bos: str | None) -> Iterator[Problem]:
    """Prompts without tokens; `bos` is as in `TokenizerFacts`. With a chat template, every prompt has tokens."""
    if bos is None or member.chat_template or not member.positive:
        return
    for name, text in _texts(member):
        if not with_bos(text, bos):
            what = "it has no tokens: a blank prompt is read as BOS, and the tokenizer has no BOS token"
            yield Problem(where=f"{member.owner}, {name} ({text[:40]!r})", what=what, remedy="give it some text")
    if bos and plan.needs_text and all(with_bos(text, bos) == bos for text in member.positive):
        user = (
            "backbone: regmean measures" if isinstance(plan, MomentPlan) else f"gate_mode {plan.mode} fits routers to"
        )
        what = f"its positive prompts have no tokens but BOS, and {user} the others"
        yield Problem(where=str(member.owner), what=what, remedy="give it some text")


def _encoded(
    member: GatePrompts, tokenizer: TokenizerFacts, encode: Callable[[str], list[int]], limit: int
) -> tuple[list[Problem], list[str]]:
    """The part of `prompt_checks` about the tokens of a member's prompts."""
    rows, long = _rows(member), []
    problems: list[Problem] = []
    for name, text in _texts(member):
        ids = encode(with_bos(text, tokenizer.bos or ""))
        if past := [number for number in ids if number >= rows]:
            token = tokenizer.tokens.get(past[0], "") if tokenizer.tokens else ""
            problems.append(missing_row_problem(f"{member.owner}, {name} ({text[:40]!r})", past[0], token, rows))
        if limit and len(ids) > limit:
            long.append(len(ids))
    if not long:
        return problems, []
    return problems, [
        f"{member.owner}: {len(long)} of its prompts have more tokens (up to {max(long)}) than the model that "
        f"reads them was made for ({limit}, max_position_embeddings): cut or split them"
    ]


def missing_row_problem(where: str, number: int, token: str, rows: int) -> Problem:
    """The problem of a token id past the last row of the embedding; `token` is its text."""
    what = f"its token {token!r} (id {number}) has no row in the embedding of {rows} rows"
    remedy = "take it out of the prompt, or use a base model whose tokenizer and weights belong together"
    return Problem(where=where, what=what, remedy=remedy)


def _rows(member: GatePrompts) -> int:
    return member.weights[EMBEDDING].entry.shape[0] if EMBEDDING in member.weights else 0


def _limit(plan: PromptPlan, member: GatePrompts) -> int:
    """The largest number of tokens that the reading model supports; 0 if none reads them, or it does not say."""
    limit = member.config.get("max_position_embeddings")
    return limit if plan.runs_model and isinstance(limit, int) else 0


def _texts(member: GatePrompts) -> Iterator[tuple[str, str]]:
    for kind, texts in (("prompt", member.positive), ("negative prompt", member.negative)):
        yield from ((f"{kind} {number}", text) for number, text in enumerate(texts, 1))


def _length_bounds(member: GatePrompts, limit: int) -> Iterator[bool]:
    """Whether each prompt may exceed the limit by its bytes alone: except BOS, a token has at least one byte."""
    return (limit > 0 and len(text.encode(errors="replace")) >= limit for _, text in _texts(member))


def prompt_warnings(gates: GatePlan) -> Iterator[str]:
    """A warning if some experts have few prompts and the gate mode needs more. Empty for other gate modes."""
    mode = MODES[gates.mode]
    counts = {member.owner: len(member.positive) for member in gates.fitted}
    few = [f"{owner} has {count}" for owner, count in counts.items() if count < _FEW]
    if mode.measured_accuracy is None or len(counts) < 2 or not few:
        return
    keywords, texts = mode.measured_accuracy
    better = ""
    if (other := better_mode(mode)) is not None and other.measured_accuracy is not None:
        better = "; gate_mode: {} sends {}% and {}%".format(other.name, *other.measured_accuracy)
    single = [str(owner) for owner, count in counts.items() if count == 1]
    unjudged = ""
    if mode.single_prompt_note and single:
        unjudged = (
            f"With one prompt ({short_list(single)}) no prompt can be held out: {mode.name} {mode.single_prompt_note}. "
        )
    yield (
        f"few prompts ({short_list(few)}): in the measurement of docs/research/routing.md {gates.mode} sends "
        f"{keywords}% of held-out tokens first to the matching expert with five keywords per expert, and "
        f"{texts}% with 16 texts per expert{better}. {unjudged}"
        "Give each expert 16 prompts or more, a few sentences each"
    )
