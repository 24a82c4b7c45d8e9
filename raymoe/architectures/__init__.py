"""One table per dense family and one per MoE architecture: tensor names, shapes, configs, and what can't be merged."""

from raymoe.architectures.dense_family import DenseFamily, TensorRow
from raymoe.architectures.dense_spec import DenseSpec, read_spec
from raymoe.architectures.families import FAMILIES
from raymoe.architectures.moe import MOE_ARCHITECTURES, find_moe_architecture
from raymoe.architectures.moe_architecture import MoeArchitecture, MoeShape
from raymoe.architectures.select_architecture import Selection, select_moe_architecture

__all__ = [
    "FAMILIES",
    "MOE_ARCHITECTURES",
    "DenseFamily",
    "DenseSpec",
    "MoeArchitecture",
    "MoeShape",
    "Selection",
    "TensorRow",
    "find_moe_architecture",
    "read_spec",
    "select_moe_architecture",
]
