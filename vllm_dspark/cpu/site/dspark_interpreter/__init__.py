"""A Triton backend named `cpu` that stands for Triton's own interpreter.

Found only by processes that have this folder's parent on their path; see `vllm_dspark.cpu`.
"""
