"""The library: data, tokenizers, layers, optimizers, checkpoints, training. Imports none of the scripts."""
