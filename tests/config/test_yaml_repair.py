"""A config that is no YAML by one common mistake: the line with the mistake is named, and what to write there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raymoe.errors import Problem

OnlyProblem = Callable[[str], Problem]
Edited = Callable[..., str]

# Of the valid config in conftest.py, by name: (text, text with the mistake), line, what, remedy.
MISTAKES = {
    "key two too few": (
        ("    positive_prompts:\n", "  positive_prompts:\n"),
        *(7, "'positive_prompts:' is indented by 2 spaces, which fits no line around it", "indent it by 4 spaces"),
    ),
    "key one too few": (
        ("    positive_prompts:\n", "   positive_prompts:\n"),
        *(7, "'positive_prompts:' is indented by 3 spaces, which", "indent it by 4 spaces"),
    ),
    "key one too many": (("    negative", "     negative"), 13, "'negative_prompts:' is indented by 5", "by 4 spaces"),
    "key two too many": (
        ("    positive_prompts:\n", "      positive_prompts:\n"),
        *(7, "'positive_prompts:' is indented by 6 spaces, which", "indent it by 4 spaces"),
    ),
    "key at the left": (
        ("    positive_prompts:\n", "positive_prompts:\n"),
        *(7, "'positive_prompts:' is not indented, which fits no line", "indent it by 4 spaces"),
    ),
    "item one too few": (
        ('      - "proof"', '     - "proof"'),
        *(9, "'- \"proof\"' is indented by 5 spaces, which fits no line around it", "indent it by 6 spaces"),
    ),
    "first item one too few": (('      - "sum"', '     - "sum"'), 8, "'- \"sum\"' is indented by 5", "by 6 spaces"),
    "item one too many": (('      - "proof"', '       - "proof"'), 9, "is indented by 7 spaces", "by 6 spaces"),
    "items four too few": (
        ('      - "sum"\n      - "proof"\n', '  - "sum"\n  - "proof"\n    noise_scale: 0.1\n'),
        *(8, "'- \"sum\"' is indented by 2 spaces, which", "indent it by 6 spaces, and the 1 after it"),
    ),
    "expert one too few": (("  - source_model: x/code", " - source_model: x/code"), 10, "by 1 space,", "by 2 spaces"),
    "expert at the left": (("  - source_model: x/code", "- source_model: x/code"), 10, "not indented", "by 2 spaces"),
    "top key indented": (("dtype:", "  dtype:"), 3, "'dtype: bfloat16' is indented by 2 spaces", "do not indent it"),
    "tab before key": (
        ("    positive_prompts:\n", "\tpositive_prompts:\n"),
        *(7, "'positive_prompts:' is indented with a tab, where YAML takes spaces only", "indent it by 4 spaces"),
    ),
    "tab before item": (('      - "proof"', '\t- "proof"'), 9, "is indented with a tab", "indent it by 6 spaces"),
    "tab after dash": (
        ("- source_model: x/code", "-\tsource_model: x/code"),
        10,
        "a tab after",
        "write: - source_model",
    ),
    "no space after colon": (
        ("source_model: x/code", "source_model:x/code"),
        *(10, "there is no space after the colon of 'source_model:'", "write: - source_model: x/code"),
    ),
    "no space after a top key's colon": (("dtype: ", "dtype:"), 3, "of 'dtype:'", "write: dtype: bfloat16"),
    "no space after dash": (
        ("- source_model: x/code", "-source_model: x/code"),
        10,
        "after the dash",
        "write: - source",
    ),
    "no space after an item's dash": (('- "proof"', '-"proof"'), 9, "after the dash", 'write: - "proof"'),
    "no colon": (
        ("    positive_prompts:\n", "    positive_prompts\n"),
        7,
        "no colon after 'positive",
        "write: positive",
    ),
    "no colon before value": (("dtype: ", "dtype "), 3, "no colon after 'dtype'", "write: dtype: bfloat16"),
    "equals sign": (("dtype: ", "dtype = "), 3, "no colon after 'dtype'", "write: dtype: bfloat16"),
    "no dash": (('      - "proof"', '      "proof"'), 9, "an item of a list has no dash", 'write: - "proof"'),
    "no dash before the first expert": (
        ("  - source", "    source"),
        6,
        "no dash",
        "begin each expert with '- source_",
    ),
    "quote not closed": (('"proof"', '"proof'), 9, 'the quote " is not closed', 'write: "proof"'),
    "last quote not closed": (('"poem"', "'poem"), 14, "the quote ' is not closed", "write: 'poem'"),
    "quotes in quotes": (
        ('"proof"', '"a "proof" b"'),
        9,
        'holds the quote "',
        "other quotes around it: 'a \"proof\" b'",
    ),
    "apostrophe": (('"proof"', "'don't'"), 9, "holds the quote '", 'other quotes around it: "don\'t"'),
    "backslash": (('"proof"', '"C:\\users"'), 9, "or a backslash", "other quotes around it: 'C:\\users'"),
    "bracket first": (
        ('"proof"', "[INST] a [/INST]"),
        9,
        "holds characters that have a mean",
        'quotes: "[INST] a [/INST]"',
    ),
    "star first": (('"proof"', "*bold* word"), 9, "'*bold* word' holds characters", 'put it in quotes: "*bold* word"'),
    "colons": (
        ('"proof"', "Note: to: you"),
        9,
        "'Note: to: you' holds characters",
        'put it in quotes: "Note: to: you"',
    ),
    "bracket not closed": (
        ('\n      - "poem"', ' ["poem"'),
        *(13, "the bracket [ is not closed", 'write: negative_prompts: ["poem"]'),
    ),
    "bracket too many": (('\n      - "poem"', ' ["poem"]]'), 13, "the bracket ] closes nothing", '["poem"]'),
    "no comma": (('\n      - "poem"', ' ["a" "b"]'), 13, "no comma between two texts", '["a", "b"]'),
    "no-break space": (("dtype: ", "dtype:\u00a0"), 3, "not the ordinary one (U+00A0)", "write: dtype: bfloat16"),
    "wide colon": (("dtype: ", "dtype\uff1a"), 3, "not the ordinary one (U+FF1A)", "write: dtype: bfloat16"),
    "no dash before the second expert": (
        ("  - source_model: x/code", "    source_model: x/code"),
        *(10, "the key is given twice, first in line 6", "begin each expert with '- source_model: ...'; or keep"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_line_and_the_remedy(
    mistake: tuple[tuple[str, str], int, str, str], only_problem: OnlyProblem, edited: Edited
) -> None:
    edit, line, what, remedy = mistake
    problem = only_problem(edited(edit))
    assert problem.where.partition(": ")[0] == f"m.yaml:{line}"
    assert what in problem.what
    assert remedy in problem.remedy
    assert "?" not in problem.what and "<block" not in problem.what, "no words of YAML's grammar"


def test_the_first_of_two_mistakes(only_problem: OnlyProblem, edited: Edited) -> None:
    """Each is told as if it were the only one, one after the other."""
    first = ("    positive_prompts:\n", "  positive_prompts:\n")
    second = ("    negative_prompts", "   negative_prompts")
    problem = only_problem(edited(first, second))
    assert (problem.where, problem.remedy) == ("m.yaml:7", "indent it by 4 spaces")
    problem = only_problem(edited(second))
    assert (problem.where, problem.remedy) == ("m.yaml:13", "indent it by 4 spaces")


def test_a_large_file_gets_no_tries(only_problem: OnlyProblem, edited: Edited) -> None:
    """Each would parse all of it. The place and a general remedy are told."""
    text = edited(("    positive_prompts:\n", "  positive_prompts:\n")) + "# ... and so on\n" * 200_000
    problem = only_problem(text)
    assert problem.where == "m.yaml:7"
    assert problem.remedy.startswith("check the indentation here and in the lines before, and put text in quotes if")
