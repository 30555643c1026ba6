"""The learned heads written out from the formulas, in numpy float64, one step at a time.

vanilla   B_k = W1[x_(k-1)] W2
gated     B_k = (sigmoid(Wg [h_k ; e]) * e) W2,  e = W1[x_(k-1)]
rnn       B_k = tanh(o) W2,  [g ; c ; o] = W [s_(k-1) ; e ; h_k],
          s_k = sigmoid(g) s_(k-1) + (1 - sigmoid(g)) tanh(c),  s_0 = 0
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_dspark.heads import MarkovHead, build_markov_head

Weights = dict[str, np.ndarray]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def reference_biases(
    head_type: str, weights: Weights, tokens: np.ndarray, hidden: np.ndarray
) -> np.ndarray:
    """tokens [R, gamma] (before each position), hidden [R, gamma, D] → biases [R, gamma, V]."""
    w1, w2 = weights["markov_w1.weight"], weights["markov_w2.weight"]
    requests, gamma = tokens.shape
    rank = w1.shape[1]
    biases = np.empty((requests, gamma, w2.shape[0]))
    for r in range(requests):
        state = np.zeros(rank)
        for k in range(gamma):
            e, h = w1[tokens[r, k]], hidden[r, k]
            if head_type == "vanilla":
                latent = e
            elif head_type == "gated":
                gate = weights["gate_proj.weight"] @ np.concatenate([h, e])
                latent = sigmoid(gate + weights["gate_proj.bias"]) * e
            else:
                joint = weights["joint_proj.weight"] @ np.concatenate([state, e, h])
                joint = joint + weights["joint_proj.bias"]
                g, c, o = joint[:rank], joint[rank : 2 * rank], joint[2 * rank :]
                state = sigmoid(g) * state + (1 - sigmoid(g)) * np.tanh(c)
                latent = np.tanh(o)
            biases[r, k] = w2 @ latent
    return biases


def make_head(head_type: str, rank: int, vocab: int, width: int, **changes: int) -> MarkovHead:
    torch.manual_seed(rank * 1000 + vocab)
    sizes = {"vocab_size": vocab, "draft_vocab_size": vocab, "rank": rank, "hidden_size": width}
    head = build_markov_head(head_type, **(sizes | changes)).double().requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_()
    return head


def arrays(module: torch.nn.Module) -> Weights:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}
