"""A trained tiny pair, inflated: the same function at the shape, and so the cost, of a large one.

A large model's weights at random give meaningless acceptance. A tiny pair has real acceptance and
real confidence, but costs nothing to run. Its inflation has both.

**The residual stream is held twice.** With d the tiny width and D the large one, a hidden state x
becomes [x, x, ~0]: what reads it is written twice along its inputs, what writes it twice along its
outputs. The mean square over D is then 2d/D times that over d, so with eps × 2d/D a norm needs
the weight

    w √(2d/D) = hi + lo,    hi = bf16(w √(2d/D)),  lo = bf16(the rest)

and the two copies carry hi and lo. The layers' projections add them up again, which keeps 16 bits
of the factor where one bf16 weight keeps 8.

**Heads, layers, words.** Query head j goes to the places of its KV group; the head norms stay.
Real layers are spread evenly over the large depth, `target_layer_ids` follow them, and inserted
layers fill the list up to the published five. Words the tiny pair lacks are copies of its dead
word, in the embedding, the LM head and both Markov tables: the tiny pair was trained to count the
dead word that often (`examples/training/target.py`), so the softmax keeps its meaning where the
vocabulary is the one it was trained to be inflated to.

**No matrix holds zeros**, because zeros run faster than weights do. Every place that holds nothing
of the tiny pair's is random, at one of two levels:

* *loud*, σ = 0.02, where it reads only places that hold ~0 or feeds only faint weights: query, key,
  value, gate and up projections, LM head, W2, confidence head;
* *faint*, σ = 0.02 · 2⁻²⁴, the same mantissas at smaller exponents, where the function demands
  zero: o_proj and down_proj (all of them in inserted layers), the embedding, `fc`, W1, and the RNN
  head's projection. What it adds is at fp32's rounding error.

Zero are only the padded biases of gated and RNN heads. Norm weights of padding are 1.

Embedding and LM head are tied where the real shape ties them. Rotary embedding, longest position,
block size, mask word and tokenizer stay the tiny pair's.

Not exact: the head norms share `rms_norm_eps` with the others, so theirs shrinks by 2d/D too. The
check (`check.py`) holds every inflated pair to 1e-3, this included.

    shapes       Qwen3's published sizes, and one's own
    checkpoint   reading safetensors folders tensor by tensor
    pair         the tiny pair, and why it cannot become a shape
    axes         where the places of a tiny axis are in a large one
    noise        loud and faint random weights at memory speed
    weights      the large pair's tensors, one shard at a time
    configs      its config.json files
    write        shards and index to disk, several at a time
    forward      logits, draft logits and confidences of a pair, one layer in memory at a time
    check        both pairs on the same text
"""
