"""Edits of mixtures: experts added, removed or replaced.

    OLD, its record, what to change --translate_edit--> a MergeConfig of NEW, and what was done

An edit is an ordinary merge whose config names experts of OLD (`source_model: OLD`, `expert: 2`), so planning, copies,
resumes and verification are those of merges. This package only writes that config.

    request.py      what a user asks for, from a command's options or Python's arguments
    mixture.py      OLD: its record, its number of experts, what a mixture without a record has
    translate.py    the config of NEW
    backbone_check.py  whether the base is that of OLD
"""

from raymoe.editing.mixture import open_mixture
from raymoe.editing.request import EditRequest, make_request
from raymoe.editing.translate import Translation, check_plan_of_edit, plan_translation, translate_edit

__all__ = [
    "EditRequest",
    "Translation",
    "check_plan_of_edit",
    "make_request",
    "open_mixture",
    "plan_translation",
    "translate_edit",
]
