"""What `import statecore` costs and registers, each time in a fresh interpreter."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_operators_need_neither_transformers_nor_cuda():
    code = """
import time, torch
begin = time.process_time()
import statecore, sys
seconds = time.process_time() - begin
print("transformers" in sys.modules, torch.cuda.is_initialized(), seconds < 2)
out, state = torch.ops.statecore.linear_attention(*torch.randn(3, 1, 4, 2, 8))
assert out.shape == (1, 4, 2, 8)
"""
    assert run(code) == "False False True"


REGISTERED = """
from transformers import AutoModelForCausalLM
config = AutoConfig.for_model("statecore_qwen2", vocab_size=8, hidden_size=8, num_attention_heads=2,
    num_key_value_heads=1, num_hidden_layers=1, intermediate_size=8, la_rank=2)
print(type(AutoModelForCausalLM.from_config(config)).__name__)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import statecore\nfrom transformers import AutoConfig",
        "from transformers import AutoConfig\nimport statecore",
        "import statecore.modeling\nfrom transformers import AutoConfig",
        "import statecore.config\nimport statecore.modeling\nfrom transformers import AutoConfig",
        "import statecore.families\nfrom transformers import AutoConfig",
        "from statecore.config import StateCoreQwen2Config\nfrom transformers import AutoConfig",
        "from statecore.modeling import StateCoreQwen2ForCausalLM\nfrom transformers import AutoConfig",
        "import statecore\nfrom transformers import pipeline, AutoConfig",
    ],
)
def test_models_are_registered_whatever_is_imported_first(imports):
    assert run(imports + REGISTERED) == "StateCoreQwen2ForCausalLM"
