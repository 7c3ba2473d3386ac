# Loss, perplexity and bits per byte of gpt2-large (774M: 36 layers, 20 heads, width 1280) on a corpus in
# GPT-2's tokens:
#   python train.py config/eval_gpt2_large.py --dataset=shakespeare
# The weights come from the Hugging Face hub, or from a folder: --init_from=path/to/gpt2-large
# Peak memory on a CPU, whole process: 6.0 GiB.

init_from = "gpt2-large"
eval_only = True
batch_size = 8
eval_iters = 500
