"""One table a dense family and one a MoE host: tensor names, shapes, output config, and what a host can't hold."""

from raymoe.architectures.dense import DenseFamily, TensorRow
from raymoe.architectures.families import FAMILIES
from raymoe.architectures.hosts import HOSTS, MoeHost, MoeShape, host_of
from raymoe.architectures.select import Selection, select_host
from raymoe.architectures.spec import DenseSpec, read_spec

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
