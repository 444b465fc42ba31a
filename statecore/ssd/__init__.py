"""Attention-free reasoning models on linear_attention: Mamba-2 and hybrids.  (PromptCoT-Mamba, arXiv 2505.22425)"""

from .model import (
    SSDCacheLayer,
    SSDConfig,
    SSDForCausalLM,
    SSDMixer,
    SSDModel,
    SSDPreTrainedModel,
    ssd_scan,
    ssd_step,
    ssm_states,
)

__all__ = [
    "SSDCacheLayer",
    "SSDConfig",
    "SSDForCausalLM",
    "SSDMixer",
    "SSDModel",
    "SSDPreTrainedModel",
    "ssd_scan",
    "ssd_step",
    "ssm_states",
]
