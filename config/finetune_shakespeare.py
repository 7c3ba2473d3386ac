# GPT-2, fine-tuned on Shakespeare: 20 steps of 32,768 tokens, about two epochs.
# gpt2 has 124M parameters; --init_from=gpt2-xl (1.5B) writes best and needs a large GPU. The weights come
# from the Hugging Face hub, or from a folder: --init_from=path/to/gpt2
# Neither time nor loss of GPT-2's own weights was measured yet.
# Peak memory on a CPU, the whole process: 3.5 GiB.

out_dir = "out/shakespeare-gpt2"
dataset = "shakespeare"
init_from = "gpt2"

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # only where the validation loss improves

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
