# Loss, perplexity and bits per byte of gpt2 (124M: 12 layers, 12 heads, width 768) on a corpus in GPT-2's
# tokens.
#   python train.py config/eval_gpt2.py --dataset=shakespeare
# The weights come from the Hugging Face hub, or from a folder: --init_from=path/to/gpt2
# Peak memory on a CPU, whole process: 1.7 GiB.

init_from = "gpt2"
eval_only = True
batch_size = 8
eval_iters = 500
