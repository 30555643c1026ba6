"""Requests whose logits are broken end with an error, each alone.

A worker that looks out for it says of every request how many of a step's last tokens mean nothing
(`broken_logits`). It says so where vLLM counts NaNs: the numbers come with the tokens, in the copy
that the engine waits for in any case. Tokens before them count: a request that they end has not
failed.

What broke a request may lie in its K/V. Attention that gives a masked key the weight zero still
makes NaN of a value that is NaN. So no later request finds these blocks in the prefix cache, and
they are zeroed before others get them: vLLM's workers do so at the start of a step, behind all that
was launched before. That holds too of a request that was aborted or preempted before the step that
broke it has ended. What it held may have gone to another one by then, which may break likewise.
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
        self._launched = self._taken_in = 0  # steps
        # By request, blocks that it gave back, and how many steps had been launched by then.
        self._left: dict[str, tuple[set[int], int]] = {}
        self._tainted: set[int] = set()  # blocks of broken requests

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Have blocks zeroed that were given back; see vLLM's."""
        zeroed = self._given_back() if self._tainted else []
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]  # vLLM's, mixed in after
        if zeroed:
            output.new_block_ids_to_zero = [*(output.new_block_ids_to_zero or ()), *zeroed]
        self._launched += 1
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
        for name in self.broken:
            self._taint(name)
            if name in self.requests:
                self._take_out(name, void[name], model_runner_output)
        self._taken_in += 1
        if self._left:
            kept = {n: left for n, left in self._left.items() if left[1] > self._taken_in}
            self._left = kept
        # vLLM's, mixed in after
        return super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )

    def _free_request_blocks(self, request: Any) -> None:
        """Note the blocks of a request that is part of a step under way; see vLLM's."""
        if self._told and request.num_in_flight_tokens > 0:
            name = request.request_id
            before, _ = self._left.get(name, (set(), 0))
            self._left[name] = before | self._held(name), self._launched
        super()._free_request_blocks(request)  # type: ignore[misc]  # vLLM's, mixed in after

    def _take_out(self, name: str, void: int, model_runner_output: Any) -> None:
        row = model_runner_output.req_id_to_index[name]
        tokens = model_runner_output.sampled_token_ids[row]
        if not tokens:  # in the middle of its prefill, after which it will fail
            return
        del tokens[-void:]
        if not tokens:  # vLLM wants nothing of a request that emits nothing
            model_runner_output.prompt_logprobs_dict.pop(name, None)
            model_runner_output.prompt_token_id_logprobs_dict.pop(name, None)
        self.encoder_cache_mismatch_reqs.add(name)
        _log(name)

    def _taint(self, name: str) -> None:
        left, _ = self._left.get(name, (set(), 0))
        blocks = left | self._held(name)
        self.kv_cache_manager.evict_blocks(blocks)
        self._tainted |= blocks

    def _held(self, name: str) -> set[int]:
        return {block for group in self.kv_cache_manager.get_block_ids(name) for block in group}

    def _given_back(self) -> list[int]:
        """Tainted blocks that nobody holds. Others are a prefix shared with a sound request, or
        went to one; what is in the prefix cache again was written anew."""
        blocks = self.kv_cache_manager.block_pool.blocks
        free = [block for block in self._tainted if blocks[block].ref_cnt == 0]
        self._tainted.difference_update(free)
        return [block for block in free if blocks[block].block_hash is None]


def _log(name: str) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.dspark").error(
        "vllm-dspark: request %s ends with an error: logits that its next token is to be drawn "
        "from are NaN, +inf, or all -inf",
        name,
    )
