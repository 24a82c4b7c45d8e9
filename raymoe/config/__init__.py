"""The merge config: mergekit-moe's YAML schema and raymoe's own keys, read, checked and frozen.

`load_config` reads files; `MergeConfig.model_validate` and `check_config` are for configs made in Python. Importing
this needs neither torch, transformers nor Ray.
"""

from raymoe.config.backbone import BackboneConfig
from raymoe.config.cross_checks import ALL_SAME_FLAG, check_config, config_warnings
from raymoe.config.load import load_config, load_config_with_positions, make_config, parse_config
from raymoe.config.prompt_sources import PromptFile
from raymoe.config.schema import Dtype, ExpertConfig, MergeConfig, PromptModel
from raymoe.config.source_positions import Loc, SourcePositions
from raymoe.config.storage_block import storage_note

__all__ = [
    "ALL_SAME_FLAG",
    "BackboneConfig",
    "Dtype",
    "ExpertConfig",
    "Loc",
    "MergeConfig",
    "PromptFile",
    "PromptModel",
    "SourcePositions",
    "check_config",
    "config_warnings",
    "load_config",
    "load_config_with_positions",
    "make_config",
    "parse_config",
    "storage_note",
]
