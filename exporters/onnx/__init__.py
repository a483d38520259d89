"""ONNX exporter: one file with bit-packed `BinaryMatMul` nodes, written tensor by tensor, read back and checked.

    export_onnx(weights, Path("model.onnx"))            write; with verify_on=ids it appears only if it is right
    export_genai(weights, Path("folder"))               the same with all that onnxruntime-genai needs beside it
    verify_export(weights, Path("model.onnx"), ids)     compare with the numpy reference
    open_onnx(Path("model.onnx"))                       read the weights back

Needs `pip install 'fbiedge[export]'`; never torch.
"""

from .export import ExportReport, export_onnx
from .genai import export_genai
from .options import ExportOptions
from .reader import open_onnx
from .verify import VerifyReport, default_text_ids, verify_export

__all__ = [
    "ExportOptions",
    "ExportReport",
    "VerifyReport",
    "default_text_ids",
    "export_genai",
    "export_onnx",
    "open_onnx",
    "verify_export",
]
