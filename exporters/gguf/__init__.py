"""GGUF exporter: Q1_0 tensors that stock llama.cpp runs, and beta beside them as an adapter.

    export_gguf(weights, Path("model.gguf"))     write, tensor by tensor; exact where the scales fold
    exactness(weights)                           whether they do
    open_gguf(Path("model.gguf"))                read anybody's back as weights

Needs `pip install 'fbiedge[export]'`; never torch.
"""

from fbiedge.gguf_model import adapter_path

from .cost import Cost, Costs
from .export import GgufReport, export_gguf
from .fold import Exactness, exactness
from .provenance import Provenance, read_provenance
from .reader import open_gguf

__all__ = [
    "Cost",
    "Costs",
    "Exactness",
    "GgufReport",
    "Provenance",
    "adapter_path",
    "exactness",
    "export_gguf",
    "open_gguf",
    "read_provenance",
]
