"""Requests whose logits are broken end with an error, each alone.

A worker that looks out for it says of every request how many of a step's last tokens mean nothing
(`broken_logits`). It says so where vLLM counts NaNs: the numbers come with the tokens, in the copy
that the engine waits for in any case. Tokens before them count: a request that they end has not
failed.

What broke a request may lie in its K/V. Attention that gives a masked key the weight zero still
makes NaN of a value that is NaN. So no later request finds these blocks in the prefix cache, and
they are zeroed before others get them: vLLM's workers do so at the start of a step, behind all that
was launched before.
"""

from __future__ import annotations

from typing import Any

from vllm_dspark.integration.step_report import take_report


class BrokenRequests:
    """Mixed into a scheduler class of vLLM's, before it.

    Attributes:
        broken: requests with broken logits in the step that is taken in.
    """

    broken: frozenset[str] = frozenset()
    requests: dict[str, Any]
    kv_cache_manager: Any
    # vLLM's, of both versions: requests that it is to end with an error as soon as it has taken in
    # the tokens of the step, if these do not end them.
    encoder_cache_mismatch_reqs: set[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._told = False  # the workers say which are broken
        self._tainted: set[int] = set()  # blocks of broken requests

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Have blocks zeroed that were given back; see vLLM's."""
        zeroed = self._given_back() if self._tainted else []
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]  # vLLM's, mixed in after
        if zeroed:
            output.new_block_ids_to_zero = [*(output.new_block_ids_to_zero or ()), *zeroed]
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take broken tokens out and have vLLM end their requests; see vLLM's."""
        startup = take_report(model_runner_output).startup
        if startup is not None:
            self._told = startup.finds_broken
        void: dict[str, int] = {}
        if self._told:
            void = model_runner_output.num_nans_in_logits or void
        self.broken = frozenset(name for name, n in void.items() if n)
        rows = model_runner_output.req_id_to_index
        for name in self.broken & self.requests.keys():
            tokens = model_runner_output.sampled_token_ids[rows[name]]
            if tokens:  # none in the middle of a prefill
                del tokens[-void[name] :]
                self._fail(name)
        # vLLM's, mixed in after
        return super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )

    def _fail(self, name: str) -> None:
        self.encoder_cache_mismatch_reqs.add(name)
        held = self.kv_cache_manager.get_block_ids(name)
        blocks = {block for group in held for block in group}
        self.kv_cache_manager.evict_blocks(blocks)
        self._tainted |= blocks
        _log(name)

    def _given_back(self) -> list[int]:
        """Tainted blocks that nobody holds. Others are a prefix shared with a sound request."""
        blocks = self.kv_cache_manager.block_pool.blocks
        free = [block for block in self._tainted if blocks[block].ref_cnt == 0]
        self._tainted.difference_update(free)
        return free


def _log(name: str) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.dspark").error(
        "vllm-dspark: request %s ends with an error: logits that its next token is to be drawn "
        "from are NaN, +inf, or all -inf",
        name,
    )
