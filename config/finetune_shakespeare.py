# Fine-tune GPT-2 on Shakespeare: 20 steps of 32,768 tokens, about two epochs.
# gpt2 has 124M parameters; --init_from=gpt2-xl (1.5B) gives the best text and needs a large GPU. The weights
# come from the Hugging Face hub, or from a folder: --init_from=path/to/gpt2
# Time and loss with GPT-2's weights have not been measured yet.
# Peak memory on a CPU, whole process: 3.5 GiB.

out_dir = "out/shakespeare-gpt2"
dataset = "shakespeare"
init_from = "gpt2"

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # only when the validation loss improves

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
