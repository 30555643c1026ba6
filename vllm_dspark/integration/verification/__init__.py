"""Adaptive verification in vLLM's V2 model runner.

plan         whether, and where lengths are known: from the configuration
create       the manager that the plan and the attention backends allow
manager      what the runner calls, and what device and host mode share
batch        a step as the manager sees it
host         lengths are known on the host
device       lengths are decided on the GPU
allocation   the ranking, on tensors
arrivals     confidences and outcomes on their way to the host
costs        step costs, profiled and corrected
profile      whether they are profiled at start-up, or were before
timing       times that costs learn from, where no scheduler of ours has them
hooks        what our workers add to vLLM's
"""
