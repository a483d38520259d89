"""Zero-shot tasks through lm-evaluation-harness, in a package of its own: only model.py needs the harness to be imported."""
