"""Training of the small target and drafter pairs that ship with this repository.

Run it from the repository root as `python -m examples.training --help`. One idea per file:

    presets     sizes of the pairs
    corpus      Python's own standard library as text and as chat
    tokenizer   byte-level BPE with a mask word and a dead word
    stream      token ids on the device, random windows of them
    optimise    the loop both trainings share, bounded in steps and in seconds
    target      the target model and its training
    generate    text in the target's own words
    drafter     the DSpark drafter: backbone and sequential heads
    loss        cross-entropy, total variation, confidence
    distill     the drafter's training
    export      checkpoints in the published format
    placing     a new pair in the place of an old one, whole
    evaluate    speculative decoding in plain torch, the figures and the equality
"""
