"""A small random GPT-2 of transformers, and its loss."""

import torch
import transformers

SIZES = {"vocab_size": 50, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 12}


def gpt2(folder, **changes):
    """A GPT-2 of transformers whose weights all matter, in a folder as Hugging Face keeps it."""
    torch.manual_seed(7)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES | changes, attn_implementation="eager")
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():  # positions most, so that it does not repeat itself
            weight.add_(torch.randn_like(weight), alpha=1.5 if "wpe" in name else 0.3)
    model.eval().save_pretrained(folder)
    return model


def loss_of(theirs, ids, targets):
    logits = theirs(torch.from_numpy(ids)).logits
    return logits, torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets.copy()).flatten()
    )
