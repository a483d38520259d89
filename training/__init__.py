"""Training of fully binarized Llama models from scratch by autoregressive distillation (FBI-LLM, arXiv 2407.07093)."""
