# The model that this machine trains best in the time given, on any corpus:
#   python train.py config/auto.py --dataset=machado_char --time_budget=5m
# Model, batch, optimizer and schedule are chosen from a short measurement, and told; what is set beside this
# file stays as it is set.

auto = True
out_dir = "out/auto"
dataset = "machado_char"
time_budget = "5m"
eval_iters = 20
