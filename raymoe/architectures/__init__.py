"""One table a dense family and one a MoE host: tensor names, shapes, output config, and what a host can't hold."""

from raymoe.architectures.dense_family import DenseFamily, TensorRow
from raymoe.architectures.dense_spec import DenseSpec, read_spec
from raymoe.architectures.families import FAMILIES
from raymoe.architectures.moe import HOSTS, host_of
from raymoe.architectures.moe_architecture import MoeHost, MoeShape
from raymoe.architectures.select_architecture import Selection, select_host

__all__ = [
    "FAMILIES",
    "HOSTS",
    "DenseFamily",
    "DenseSpec",
    "MoeHost",
    "MoeShape",
    "Selection",
    "TensorRow",
    "host_of",
    "read_spec",
    "select_host",
]
