"""lm-evaluation-harness' own command line, with our runtime among its models:

python -m fbiedge.harness run --model fbiedge --model_args path=model.onnx --tasks piqa
"""

from importlib import import_module

from . import model  # noqa: F401 (makes itself known)

import_module("lm_eval.__main__").cli_evaluate()
