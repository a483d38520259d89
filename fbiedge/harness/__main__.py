"""lm-evaluation-harness' own command line, with our runtime among its models:

python -m fbiedge.harness run --model fbiedge --model_args path=model.onnx --tasks piqa
"""

from lm_eval.__main__ import cli_evaluate  # type: ignore[import-untyped, import-not-found, unused-ignore]

from . import model  # noqa: F401 (makes itself known)

cli_evaluate()
