"""The programs that serve merges, and what each of them computes of each MoE architecture.

    config.json --features_of--> features --judge, with the rows of rows.csv--> same, otherwise or fails

    engines.py    ENGINES            the engines, with the commands that serve a merge
    features.py   FEATURES           features of a merge on which engines differ
    rows.csv      EngineRow          engine x version x architecture x feature: what was found, and how
    table.py      judge              the rows that apply to a merge, as one verdict

scripts/run_engines.py writes the rows that were `run`. Rows that were `read` are from the engine's source. This package
is data and pure functions: planning warns from it, `raymoe archs --engine` and docs/engines.md print it.
"""

from raymoe.engines.engines import ENGINES, WARNED_ENGINES, Engine
from raymoe.engines.features import FEATURES, ServedModel, features_of
from raymoe.engines.table import FAILS, OTHERWISE, SAME, UNKNOWN, EngineRow, Verdict, engine_rows, judge

__all__ = [
    "ENGINES",
    "FAILS",
    "FEATURES",
    "OTHERWISE",
    "SAME",
    "UNKNOWN",
    "WARNED_ENGINES",
    "Engine",
    "EngineRow",
    "ServedModel",
    "Verdict",
    "engine_rows",
    "features_of",
    "judge",
]
