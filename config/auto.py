# The model that this machine trains best in the time given, on any corpus:
#   python train.py config/auto.py --dataset=machado_char --time_budget=5m
# Model, batch, optimizer and schedule are chosen from a short measurement, and told; what is set beside this
# file stays as it is set.
# Measured on two cores of an Intel Xeon with AMX (2.6 GHz), whole-validation loss on machado_char: 1.509 in
#   one minute, 1.341 in five, 1.319 in fifteen (train_machado_char_cpu_modern.py: 1.600 and 1.470).
# Peak memory on a CPU, the whole process: 532 MiB with what it chooses for one minute of machado_char
#   (4 layers, 128 wide), 612 MiB with that for five (192 wide).
# Swept there, 4 layers, Muon. In 60 s: 64 wide 1.597, 96 1.591, 128 1.589, with RoPE 1.546, and then 192
#   1.576; of 128 wide with RoPE: QK and RMS norm 1.546, 128 tokens of context instead of 64 1.532, two heads
#   and decay_frac 0.8 1.530, muon_momentum 0.9, muon_learning_rate 1e-2 and beta2 0.95 1.513, all three
#   1.512, with higher learning rates 1.515. In 300 s, compiled: 128 wide 1.387, 192 on 128 tokens 1.339, 256
#   (5 layers) 1.342.

auto = True
out_dir = "out/auto"
dataset = "machado_char"
time_budget = "5m"
