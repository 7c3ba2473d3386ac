"""A small GPT-2 of transformers with random weights, its logits and its loss."""

import torch
import transformers

SIZES = {"vocab_size": 50, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 12}


def save_random_gpt2(folder, **changes):
    """Save a GPT-2 of transformers in `folder`, with weights that are not near 0, and return the model."""
    torch.manual_seed(7)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES | changes, attn_implementation="eager")
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():  # large position weights make the generated text varied
            weight.add_(torch.randn_like(weight), alpha=1.5 if "wpe" in name else 0.3)
    model.eval().save_pretrained(folder)
    return model


def logits_and_loss(model, ids, targets):
    logits = model(torch.from_numpy(ids)).logits
    return logits, torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets.copy()).flatten()
    )
