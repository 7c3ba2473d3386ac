# Loss, perplexity and bits per byte of gpt2-medium (350M: 24 layers, 16 heads, width 1024) on a corpus in
# GPT-2's tokens:
#   python train.py config/eval_gpt2_medium.py --dataset=shakespeare
# The weights come from the Hugging Face hub, or from a folder: --init_from=path/to/gpt2-medium
# Peak memory on a CPU, whole process: 3.6 GiB.

init_from = "gpt2-medium"
eval_only = True
batch_size = 8
eval_iters = 500
