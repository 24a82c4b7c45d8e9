"""Lists the text and image-text model types of transformers that no table of raymoe knows.

    python scripts/list_model_types.py               # of the installed transformers; exit status 1 if there is one
    python scripts/list_model_types.py --all         # every type, and what raymoe says of it

A type is known if its models are merged (a dense family, or a wrapper around one) or refused with a reason. Types are
read from the source of transformers' auto classes, so that neither transformers nor torch is imported.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

from raymoe.architectures.families import FAMILIES
from raymoe.architectures.original_context import MODEL_TYPE as MINISTRAL_3
from raymoe.architectures.unsupported_families import unsupported_reason
from raymoe.architectures.wrappers import TEXT_TYPES, WRAPPERS

# What reads text and writes text, alone or beside images and sound.
MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every type, and what raymoe says of it")
    everything = parser.parse_args().all
    types = model_types(auto_classes())
    unknown = [name for name in types if not what_raymoe_says(name)]
    if everything:
        for name in sorted(types):
            print(f"{name}: {what_raymoe_says(name) or 'unknown'}")
    elif unknown:
        print(f"transformers {version('transformers')} has model types that no table of raymoe knows:")
        print(*(f"  {name} ({types[name]})" for name in unknown), sep="\n")
        print("Add each to FAMILIES or WRAPPERS, or to unsupported_families.py with the reason.")
    sys.exit(1 if unknown else 0)


def auto_classes() -> str:
    """The source of transformers' lists of model types."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        sys.exit("transformers is not installed")
    return (Path(spec.origin).parent / "models/auto/modeling_auto.py").read_text(encoding="utf-8")


def model_types(source: str) -> dict[str, str]:
    """Model type to class name, of all `MAPPINGS`. Ends the program if one of them is not found."""
    found: dict[str, dict[str, str]] = {}
    for statement in ast.parse(source).body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if isinstance(statement, ast.Assign) and isinstance(target, ast.Name) and target.id in MAPPINGS:
            found[target.id] = _pairs(statement.value)
    if missing := [name for name in MAPPINGS if not found.get(name)]:
        sys.exit(f"transformers {version('transformers')} has no {', '.join(missing)} that can be read")
    return {name: class_name for mapping in MAPPINGS for name, class_name in found[mapping].items()}


def _pairs(value: ast.expr) -> dict[str, str]:
    """The pairs of strings in an `OrderedDict([...])`, without those that it takes from another mapping."""
    items = value.args[0] if isinstance(value, ast.Call) and value.args else None
    if not isinstance(items, ast.List):
        return {}
    return dict(ast.literal_eval(item) for item in items.elts if isinstance(item, ast.Tuple))


def what_raymoe_says(model_type: str) -> str:
    """`merged` or the reason of a refusal; empty for a type that no table knows."""
    return (
        "merged" if model_type in {*FAMILIES, *WRAPPERS, *TEXT_TYPES, MINISTRAL_3} else unsupported_reason(model_type)
    )


if __name__ == "__main__":
    main()
