"""What an engine would serve under a load: the real scheduler code over a model of the engine.

acceptance  what drafts survive, and what the confidence head says of it
engine      what steps take
workload    requests and their lengths
replica     one engine, step by step
policies    what is drafted and verified: nothing, a fixed number, what vLLM's built-in mode would
ours        the same by our scheduler, calibrator and cost model
loads       closed loops and Poisson arrivals, on one GPU or many
measured    a sweep's measurements, as far as they are needed here
fitting     the engine's costs from those
validation  simulated against measured
planning    every policy at every load
options     what `vllm-dspark simulate` was asked for
inputs      files it starts from
tables      planning and validation as tables
plots       planning as a picture
command     `vllm-dspark simulate`

Pure numpy but for the last four; neither vLLM nor a clock is needed.
"""
