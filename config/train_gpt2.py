# GPT-2 124M on OpenWebText, for 8 GPUs of 40 GB or more:
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# nanoGPT reports a validation loss of about 2.85 after four days on 8 A100s; not measured here.
# Peak memory on a CPU, whole process: 5.3 GiB.

out_dir = "out/gpt2"
dataset = "openwebtext"
wandb_log = False  # True: log to Weights & Biases too
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 sequences x 1024 tokens x 40 micro-batches, split over the GPUs: 491,520 tokens per step
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000  # 300B tokens
lr_decay_iters = max_iters
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
