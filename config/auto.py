# The best model that this machine can train in the given time, on any corpus:
#   python train.py config/auto.py --dataset=machado_char --time_budget=5m
# Model, batch size, optimizer and schedule are chosen after a short measurement and printed. Settings that
# you give in addition to this file are kept.
# Measured in one minute on two cores of an AMD EPYC (Zen 5) held to AVX2, bits per byte on the whole
#   validation split: machado_char 1.936, shakespeare_char 2.178, eca_char 2.012, python_char 1.534. nanoGPT
#   with its settings for a CPU in the same time: 2.707, 2.803, 2.782 and 2.371. In five minutes machado_char
#   1.905, and with BPE of 1,024 or 2,048 tokens machado 1.875, shakespeare 2.098, eca 1.860.
# What was tried: docs/BENCHMARKS.md. The settings of the optimizers come from an Intel Xeon with AMX, in 60
#   s, 4 layers of width 128 without n-grams, Muon with RoPE, loss on machado_char: 1.546; QK norm and RMSNorm
#   1.546; context of 128 tokens instead of 64 1.532; two heads and decay_frac 0.8 1.530; muon_momentum 0.9,
#   muon_learning_rate 1e-2 and beta2 0.95 1.513; with higher learning rates 1.515.

auto = True
out_dir = "out/auto"
dataset = "machado_char"
time_budget = "5m"
