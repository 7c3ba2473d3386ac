# Loss, perplexity and bits per byte of gpt2-xl (1.5B: 48 layers, 25 heads, width 1600) on a corpus in GPT-2's
# tokens.
#   python train.py config/eval_gpt2_xl.py --dataset=shakespeare
# The weights come from the Hugging Face hub, or from a folder: --init_from=path/to/gpt2-xl
# Peak memory on a CPU, whole process: 11.4 GiB.

init_from = "gpt2-xl"
eval_only = True
batch_size = 8
eval_iters = 500
