# The best model that this machine can train in the given time, on any corpus:
#   python train.py config/auto.py --dataset=machado_char --time_budget=5m
# Model, batch size, optimizer and schedule are chosen after a short measurement and printed. Settings that
# you give in addition to this file are kept.
# Measured on two cores of an Intel Xeon with AMX (2.6 GHz), loss on the whole validation split of
#   machado_char: 1.509 in one minute, 1.341 in five, 1.319 in fifteen (train_machado_char_cpu_modern.py:
#   1.600 in one and 1.470 in five).
# Peak memory on a CPU, whole process: 532 MiB with the model chosen for one minute of machado_char (4 layers,
#   width 128), 612 MiB with that for five minutes (width 192).
# Tuning on that machine, 4 layers, Muon. In 60 s: width 64 1.597, 96 1.591, 128 1.589, 128 with RoPE 1.546,
#   192 with RoPE 1.576. Width 128 with RoPE: QK norm and RMSNorm 1.546, context of 128 tokens instead of 64
#   1.532, two heads and decay_frac 0.8 1.530, muon_momentum 0.9, muon_learning_rate 1e-2 and beta2 0.95
#   1.513, all three of these changes 1.512, with higher learning rates 1.515. In 300 s, compiled: width 128
#   1.387, 192 with 128 tokens 1.339, 256 (5 layers) 1.342.

auto = True
out_dir = "out/auto"
dataset = "machado_char"
time_budget = "5m"
