"""With our verification kernels, what a seeded request says does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine import Request, engine, run, tokens
from tests.pairs import write_drafter, write_target
from tests.verification_cases import runner_of
from vllm_dspark.kernels.residual import residual_tiles

pytestmark = pytest.mark.engine

WORDS = 3000


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """More words than one program sums up: a token is drawn in two stages."""
    assert residual_tiles(WORDS)[1] > 1
    folder = write_target(tmp_path_factory.mktemp("pair"), seed=5, vocab_size=WORDS)
    write_drafter(folder / "dspark", folder, seed=6)
    dspark = {"kernels": "triton", "verification": "all", "depth": 1}
    options = {"skip_tokenizer_init": True, "additional_config": {"dspark": dspark}}
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64}
    with engine(folder, "dspark", enable_prefix_caching=False, **small, **options) as made:
        yield made


def test_the_first_token_is_the_same_beside_drafts(llm: Any) -> None:
    """Alone, a request's first step has no drafts. Beside another one it has, and with top-k the
    step's logits are processed. Catches a step without drafts that is sampled in another way."""
    runner = runner_of(llm)
    assert runner.sampler.beside_drafts is not None
    free = {"max_tokens": 2, "ignore_eos": True, "detokenize": False, "temperature": 1.0}
    seeded = [
        Request([3, 5, i], free | {"seed": i} | ({"top_k": 400} if i % 3 == 0 else {}))
        for i in range(6)
    ]
    alone = [tokens(run(llm, [request]))[0] for request in seeded]
    neighbour = Request([1, 2], free | {"max_tokens": 14, "seed": 99})
    late = [Request(r.prompt, r.params, arrives=2 + 2 * i) for i, r in enumerate(seeded)]
    together = tokens(run(llm, [neighbour, *late]))[1:]
    assert together == alone
    assert len({token for token, _ in alone}) > 3
